package check

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// The capabilities that the daemons use (linux/capability.h), and for what.
var capabilities = []struct {
	bit  uint
	name string
	need bool
	what string
}{
	{12, "NET_ADMIN", true, "routes, devices and packet filters"},
	{13, "NET_RAW", true, "raw and packet sockets"},
	{21, "SYS_ADMIN", true, "the agent enters the pods' network namespaces"},
	{10, "NET_BIND_SERVICE", true, "BGP listens on port 179"},
	{39, "BPF", false, "superpackets to other nodes leave whole, --attach direct, --io xdp"},
}

func (n *Node) path(p string) string { return filepath.Join("/", n.Root, p) }

// capabilities looks at this process': the daemons are usually started with the same.
func (n *Node) capabilities() Result {
	const name = "capabilities"
	b, err := os.ReadFile(n.path("/proc/self/status"))
	if err != nil {
		return unknown(name, err)
	}
	var effective uint64
	for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
		if v, is := strings.CutPrefix(sc.Text(), "CapEff:"); is {
			if effective, err = strconv.ParseUint(strings.TrimSpace(v), 16, 64); err != nil {
				return unknown(name, err)
			}
		}
	}
	var have, missing, faster []string
	for _, c := range capabilities {
		switch {
		case effective>>c.bit&1 == 1:
			have = append(have, c.name)
		case c.need:
			missing = append(missing, fmt.Sprintf("%s (%s)", c.name, c.what))
		default:
			faster = append(faster, fmt.Sprintf("%s (%s)", c.name, c.what))
		}
	}
	r := Result{Name: name, Status: OK, Found: "have " + strings.Join(have, ", ")}
	if len(have) == 0 {
		r.Found = "have none of those that count"
	}
	switch {
	case len(missing) > 0:
		r.Status, r.Do = Fail, "run as root, or add "+strings.Join(append(missing, faster...), ", ")
	case len(faster) > 0:
		r.Status, r.Do = Warn, "add "+strings.Join(faster, ", ")
	}
	return r
}

// sysctl reads one below /proc/sys/net, a number.
func (n *Node) sysctl(name string) (int, error) {
	b, err := os.ReadFile(n.path("/proc/sys/net/" + name))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// ipForward: the agent sets it at its start, so it matters only once there is one.
func (n *Node) ipForward() Result {
	const name = "ip_forward"
	v, err := n.sysctl("ipv4/ip_forward")
	switch {
	case err != nil:
		return unknown(name, err)
	case v != 0:
		return ok(name, "net.ipv4.ip_forward is %d", v)
	case n.Agent:
		return Result{name, Fail, "net.ipv4.ip_forward is 0: the kernel forwards no packet of a pod, and something has switched it off since the agent started",
			"sysctl -w net.ipv4.ip_forward=1, and find who sets it in /etc/sysctl.d or a firewall's configuration"}
	}
	return ok(name, "net.ipv4.ip_forward is 0; margay-agent sets it at its start")
}

// reversePath: the greater of all's and the interface's counts. Strict filtering drops what comes in by another interface
// than the answer would take: on vr0 the answers of other nodes' hosts, on the underlay an asymmetric way.
func (n *Node) reversePath() Result {
	const name = "rp_filter"
	all, err := n.sysctl("ipv4/conf/all/rp_filter")
	if err != nil {
		return unknown(name, err)
	}
	effective := func(device string) (int, bool) {
		v, err := n.sysctl("ipv4/conf/" + device + "/rp_filter")
		return max(v, all), err == nil
	}
	tunnel, there := effective(n.Tunnel)
	switch {
	case there && tunnel == 1 && all == 1:
		return Result{name, Warn, "net.ipv4.conf.all.rp_filter is 1: strict on " + n.Tunnel + " too, which drops packets whose answer would go another way",
			"sysctl -w net.ipv4.conf.all.rp_filter=0 (or 2, loose)"}
	case there && tunnel == 1:
		return Result{name, Warn, "net.ipv4.conf." + n.Tunnel + ".rp_filter is 1: it drops packets whose answer would go another way",
			"sysctl -w net.ipv4.conf." + n.Tunnel + ".rp_filter=0, as margay-agent does"}
	case !there && all == 1:
		return Result{name, Warn, "net.ipv4.conf.all.rp_filter is 1, and will be strict on " + n.Tunnel + " too",
			"sysctl -w net.ipv4.conf.all.rp_filter=0 (or 2, loose); the pods' interfaces stay strict, margay-agent sees to it"}
	}
	return ok(name, "not strict on %s", n.Tunnel)
}

// running reports which of the programs run in this network namespace, by the names that the kernel has for them.
func (n *Node) running(names ...string) ([]string, error) {
	here, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	dirs, err := filepath.Glob(n.path("/proc/[0-9]*/comm"))
	if err != nil {
		return nil, err
	}
	found := make(map[string]bool)
	for _, d := range dirs {
		b, err := os.ReadFile(d)
		if err != nil {
			continue // it has ended meanwhile
		}
		if there, err := os.Readlink(filepath.Join(filepath.Dir(d), "ns/net")); err != nil || there == here {
			found[strings.TrimSpace(string(b))] = true
		}
	}
	var out []string
	for _, name := range names {
		if found[comm(name)] {
			out = append(out, name)
		}
	}
	return out, nil
}

// comm is what the kernel keeps of a program's name: 15 bytes.
func comm(name string) string { return name[:min(len(name), 15)] }

// configured reports whether some line of the files that match has all of words, in any case of letters.
func (n *Node) configured(words []string, patterns ...string) (bool, error) {
	for _, p := range patterns {
		files, err := filepath.Glob(n.path(p))
		if err != nil {
			return false, err
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return false, err
			}
			for line := range strings.Lines(strings.ToLower(string(b))) {
				line = strings.TrimSpace(line)
				has := !strings.HasPrefix(line, "#")
				for _, w := range words {
					has = has && strings.Contains(line, w)
				}
				if has {
					return true, nil
				}
			}
		}
	}
	return false, nil
}

// networkManager takes interfaces over that it is not told to leave alone, and their routes with them.
func (n *Node) networkManager() Result {
	const name = "NetworkManager"
	up, err := n.running("NetworkManager")
	if err != nil {
		return unknown(name, err)
	}
	if len(up) == 0 {
		return ok(name, "does not run")
	}
	told, err := n.configured([]string{"unmanaged-devices", "cali"}, "/etc/NetworkManager/NetworkManager.conf", "/etc/NetworkManager/conf.d/*.conf",
		"/run/NetworkManager/conf.d/*.conf", "/usr/lib/NetworkManager/conf.d/*.conf")
	switch {
	case err != nil:
		return unknown(name, err)
	case told:
		return ok(name, "runs, and leaves cali* alone")
	}
	return Result{name, Warn, "runs, and may take over the pods' interfaces and " + n.Tunnel,
		"put unmanaged-devices=interface-name:cali*;interface-name:" + n.Tunnel + "* under [keyfile] in /etc/NetworkManager/conf.d/margay.conf, and reload it"}
}

// networkd removes routes that it has not made.
func (n *Node) networkd() Result {
	const name = "systemd-networkd"
	up, err := n.running("systemd-networkd")
	if err != nil {
		return unknown(name, err)
	}
	if len(up) == 0 {
		return ok(name, "does not run")
	}
	told, err := n.configured([]string{"manageforeignroutes", "no"}, "/etc/systemd/networkd.conf", "/etc/systemd/networkd.conf.d/*.conf",
		"/run/systemd/networkd.conf.d/*.conf", "/usr/lib/systemd/networkd.conf.d/*.conf")
	switch {
	case err != nil:
		return unknown(name, err)
	case told:
		return ok(name, "runs, and leaves others' routes alone")
	}
	return Result{name, Warn, "runs, and removes routes that it has not made when it restarts or a link changes",
		"put ManageForeignRoutes=no under [Network] in /etc/systemd/networkd.conf.d/margay.conf, and restart it"}
}
