package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"margay/vrouter/rpc"
)

// TestMain makes the test binary the daemon itself when asked to.
func TestMain(m *testing.M) {
	if os.Getenv("MARGAY_TEST_VROUTER") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// space is a network namespace without a name, with a thread of its own.
type space struct{ run chan func() }

func newSpace(t *testing.T) *space {
	t.Helper()
	s := &space{run: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never given back: the thread ends with the namespace
		_, err := netns.New()
		ready <- err
		for f := range s.run {
			f()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { close(s.run) })
	s.do(t, func() error { return up("lo") })
	return s
}

func (s *space) do(t *testing.T, f func() error) {
	t.Helper()
	result := make(chan error)
	s.run <- func() { result <- f() }
	if err := <-result; err != nil {
		t.Fatal(err)
	}
}

func up(name string, addresses ...string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	for _, text := range addresses {
		a, err := netlink.ParseAddr(text)
		if err != nil {
			return err
		}
		if err := netlink.AddrReplace(link, a); err != nil {
			return err
		}
	}
	return netlink.LinkSetUp(link)
}

// daemon is one vrouter process.
type daemon struct {
	cmd    *exec.Cmd
	output bytes.Buffer
	dir    string
}

func command(args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), "MARGAY_TEST_VROUTER=1")
	return cmd
}

// start runs a vrouter in the namespace, with its socket and state in dir, and waits until it answers.
func (s *space) start(t *testing.T, dir string, args ...string) *daemon {
	t.Helper()
	d := &daemon{dir: dir, cmd: command(append([]string{"--socket", filepath.Join(dir, "vrouter.sock"), "--state-dir", dir}, args...)...)}
	d.cmd.Stdout, d.cmd.Stderr = &d.output, &d.output
	s.do(t, d.cmd.Start)
	t.Cleanup(func() { d.stop(t, syscall.SIGKILL) })
	c := d.dial(t)
	eventually(t, "vrouter answers", func() bool {
		_, err := c.Status(t.Context())
		return err == nil
	})
	return d
}

// stop sends a signal and waits for the end; after the first time it does nothing.
func (d *daemon) stop(t *testing.T, signal os.Signal) {
	if d.cmd.ProcessState != nil {
		return
	}
	if err := d.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Error(err)
	}
	err := d.cmd.Wait()
	if signal == syscall.SIGTERM && err != nil {
		t.Errorf("%v\n%s", err, d.output.String())
	}
}

// cpuTicks returns the processor time that the daemon has used, in hundredths of a second (USER_HZ).
func (d *daemon) cpuTicks(t *testing.T) int {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", d.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	// After the name, which is in parentheses: utime and stime are the 12th and 13th field.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	user, err := strconv.Atoi(fields[11])
	system, err2 := strconv.Atoi(fields[12])
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	return user + system
}

func (d *daemon) dial(t *testing.T) *rpc.Client {
	t.Helper()
	c, err := rpc.Dial(filepath.Join(d.dir, "vrouter.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

// configure programs node index (1 or 2) as its agent would.
func (d *daemon) configure(t *testing.T, index byte) {
	t.Helper()
	other := 3 - index
	node := func(i byte) netip.Addr { return netip.AddrFrom4([4]byte{198, 18, 0, i}) }
	block := func(i byte) netip.Prefix { return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, i, 0}), 26) }
	c := d.dial(t)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	_, err := c.Begin(ctx)
	if err == nil {
		err = c.Update(ctx, rpc.Update{
			Config:   &rpc.Config{NodeAddress: node(index), Underlay: "eth0", MTU: 1480},
			AddNodes: []netip.Addr{node(index), node(other)},
			Set:      []rpc.Route{{Prefix: block(index), NextHop: rpc.Local()}, {Prefix: block(other), NextHop: rpc.Tunnel(node(other))}},
		})
	}
	if err == nil {
		_, err = c.End(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestDaemons: see daemons, on each attachment, by each kind of I/O.
func TestDaemons(t *testing.T) {
	for args, port := range map[string]string{
		"--attach tun": "vr0 by tun, packet (asked for), offloads checksum, TSO, USO; underlay eth0 (superpackets whole (AF_PACKET, TCX))",
		"--attach auto": "vr0 by veth, packet (auto: this kernel has what it needs), offloads checksum, TSO, USO (AF_PACKET); " +
			"underlay eth0 (superpackets whole (AF_PACKET, TCX))",
		"--attach veth --threads-per-queue 1": "vr0 by veth, packet (asked for), offloads checksum, TSO, USO (AF_PACKET); underlay eth0 (superpackets whole (AF_PACKET, TCX)); " +
			"one thread for both directions",
		"--attach tun --queues 4": "vr0 by tun, packet (asked for), offloads checksum, TSO, USO; underlay eth0 (superpackets whole (AF_PACKET, TCX)); " +
			"4 queues",
		"--attach tun-plain": "vr0 by tun-plain, packet (asked for), offloads none; underlay eth0",
		"--attach veth":      "vr0 by veth, packet (asked for), offloads checksum, TSO, USO (AF_PACKET); underlay eth0 (superpackets whole (AF_PACKET, TCX))",
		"--attach veth --io xdp --busy-poll 20": "vr0 by veth, xdp (asked for), offloads none toward us (AF_XDP native, copy, busy polling); " +
			"underlay eth0 (superpackets whole (AF_PACKET, TCX); AF_XDP native, copy, busy polling)",
		"--attach tun --io xdp --cpus 0": "vr0 by tun, xdp (asked for), offloads checksum, TSO, USO; " +
			"underlay eth0 (superpackets whole (AF_PACKET, TCX); AF_XDP native, copy)",
	} {
		if !strings.Contains(args, "--queues") {
			args += " --queues 1" // the default is the machine's
		}
		if !strings.Contains(args, "--threads") {
			args += " --threads-per-queue 2" // likewise
		}
		t.Run(args, func(t *testing.T) { daemons(t, strings.Fields(args), port) })
	}
}

// daemons: two daemons forward; one is stopped, then killed, and each time forwards again from its snapshot, with
// vr0 and its routes as they were and without anyone programming it anew.
func daemons(t *testing.T, args []string, port string) {
	a, b := newSpace(t), newSpace(t)
	dirA, dirB := t.TempDir(), t.TempDir()
	// The thread's namespace, by its number, is what the other side of the pair is put into.
	var peer netns.NsHandle
	b.do(t, func() (err error) { peer, err = netns.Get(); return err })
	defer peer.Close()
	a.do(t, func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(peer)})
	})
	var dirs = map[*space]string{a: dirA, b: dirB}
	running := map[*space]*daemon{}
	for i, s := range []*space{a, b} {
		index := byte(i + 1)
		s.do(t, func() error { return up("eth0", fmt.Sprintf("198.18.0.%d/24", index)) })
		running[s] = s.start(t, dirs[s], args...)
		running[s].configure(t, index)
		s.do(t, func() error {
			link, err := netlink.LinkByName("vr0")
			if err != nil {
				return err
			}
			if link.Attrs().MTU != 1480 {
				return fmt.Errorf("MTU of vr0: %d", link.Attrs().MTU)
			}
			own := fmt.Sprintf("10.244.%d.1", index)
			if err := up("vr0", own+"/32"); err != nil {
				return err
			}
			_, pool, err := net.ParseCIDR("10.244.0.0/16")
			if err != nil {
				return err
			}
			return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: pool, Src: net.ParseIP(own)})
		})
	}
	var server, conn *net.UDPConn
	b.do(t, func() (err error) {
		server, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(10, 244, 2, 1)})
		return err
	})
	defer server.Close()
	go func() {
		buf := make([]byte, 2000)
		for {
			n, from, err := server.ReadFromUDP(buf)
			if err != nil {
				return
			}
			// What cannot be answered shows as a missing answer.
			_, _ = server.WriteToUDP(buf[:n], from)
		}
	}()
	a.do(t, func() (err error) {
		conn, err = net.DialUDP("udp4", nil, server.LocalAddr().(*net.UDPAddr))
		return err
	})
	defer conn.Close()
	number := byte(0)
	answered := func() bool {
		number++ // an answer to an earlier one, which comes late, does not count
		if conn.SetDeadline(time.Now().Add(200*time.Millisecond)) != nil {
			return false
		}
		if _, err := conn.Write([]byte{number}); err != nil {
			return false
		}
		for got := make([]byte, 10); ; {
			if _, err := conn.Read(got); err != nil {
				return false
			}
			if got[0] == number {
				return true
			}
		}
	}
	eventually(t, "first answer", answered)
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		// What it was told is in the snapshot soon after it was told, killed or not.
		eventually(t, "snapshot", func() bool {
			_, err := os.Stat(filepath.Join(dirB, "fib.snapshot"))
			return err == nil
		})
		running[b].stop(t, signal)
		if answered() {
			t.Errorf("an answer after %v", signal)
		}
		eventually(t, "no XDP program is left behind", func() (gone bool) {
			b.do(t, func() error {
				eth0, err := netlink.LinkByName("eth0")
				gone = err == nil && (eth0.Attrs().Xdp == nil || !eth0.Attrs().Xdp.Attached)
				return err
			})
			return gone
		})
		if i := slices.Index(args, "--queues"); signal == syscall.SIGKILL && args[i+1] == "4" { // and comes back with fewer
			args, port = slices.Clone(args), strings.Replace(port, "4 queues", "2 queues", 1)
			args[i+1] = "2"
		}
		running[b] = b.start(t, dirB, args...)
		eventually(t, fmt.Sprintf("answer after %v and a restart", signal), answered)
		s, err := running[b].dial(t).Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if !s.Restored || !s.Configured || s.Routes != 2 || s.Nodes != 2 || s.Stale != 4 || s.Port != port {
			t.Errorf("status after %v: %+v", signal, s)
		}
	}
	eventually(t, "without traffic it costs nothing", func() bool {
		before := running[b].cpuTicks(t)
		time.Sleep(time.Second)
		return running[b].cpuTicks(t)-before <= 1 // of 100 in a second
	})
	b.do(t, func() error {
		cmd := command("--socket", filepath.Join(dirB, "vrouter.sock"), "--state-dir", dirB)
		expectRefused(t, cmd, "another vrouter is alive")
		other := t.TempDir()
		cmd = command("--socket", filepath.Join(other, "vrouter.sock"), "--state-dir", other)
		expectRefused(t, cmd, "another process")
		if left, err := os.ReadDir(other); err != nil || len(left) != 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
		return nil
	})
}

// expectRefused runs cmd and wants exit code 1 and one line that contains want.
func expectRefused(t *testing.T, cmd *exec.Cmd, want string) {
	t.Helper()
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || strings.Count(string(out), "\n") != 1 || !strings.Contains(string(out), want) {
		t.Errorf("%v: %v, %q: expected exit code 1 and one line with %q", cmd.Args[1:], err, out, want)
	}
}

func TestCommandLine(t *testing.T) {
	for _, arg := range []string{"--version", "--help"} {
		out, err := command(arg).CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("vrouter")) {
			t.Errorf("%s: %v, %s", arg, err, out)
		}
	}
	expectRefused(t, command("--bogus"), "unknown flag")
	expectRefused(t, command("extra"), "extra")
	expectRefused(t, command("--log-level", "loud"), "loud")
	expectRefused(t, command("--tun", "a/b"), "--tun")
	expectRefused(t, command("--attach", "tap"), "--attach")
	expectRefused(t, command("--io", "dpdk"), "--io")
	expectRefused(t, command("--attach", "tun-plain", "--io", "xdp"), "--io")
	expectRefused(t, command("--attach", "tun", "--io", "tc"), "--attach direct")
	expectRefused(t, command("--busy-poll", "5"), "--busy-poll")
	expectRefused(t, command("--queues", "-1"), "--queues")
	expectRefused(t, command("--threads-per-queue", "3"), "--threads-per-queue")
	expectRefused(t, command("--cpus", "0-"), "--cpus")
	expectRefused(t, command("--cpus", "1023"), "may not use CPU 1023")
}

// TestWithoutBPF: with NET_ADMIN and NET_RAW alone everything works, and the status says what would make it faster.
func TestWithoutBPF(t *testing.T) {
	s := newSpace(t)
	dir := t.TempDir()
	s.do(t, func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0", Flags: net.FlagUp}, PeerName: "eth1"})
	})
	d := &daemon{dir: dir, cmd: exec.Command("setpriv", "--bounding-set", "-all,+net_admin,+net_raw", "/proc/self/exe",
		"--socket", filepath.Join(dir, "vrouter.sock"), "--state-dir", dir, "--attach", "auto")}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	d.cmd.Args[3] = exe
	d.cmd.Env = append(os.Environ(), "MARGAY_TEST_VROUTER=1")
	d.cmd.Stdout, d.cmd.Stderr = &d.output, &d.output
	s.do(t, d.cmd.Start)
	t.Cleanup(func() { d.stop(t, syscall.SIGTERM) })
	c := d.dial(t)
	eventually(t, "vrouter answers", func() bool {
		_, err := c.Status(t.Context())
		return err == nil
	})
	d.configure(t, 1)
	eventually(t, "status says why", func() bool {
		status, err := c.Status(t.Context())
		return err == nil && strings.HasPrefix(status.Port, "vr0 by veth, packet ") && strings.Contains(status.Port, "capability BPF")
	})
}

// TestOtherAttachment: a vrouter takes over what one with another attachment has left under the same name, and nobody
// else's device.
func TestOtherAttachment(t *testing.T) {
	s := newSpace(t)
	s.do(t, func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0", Flags: net.FlagUp}, PeerName: "eth1"})
	})
	for _, want := range []struct{ attach, kind string }{
		{"tun", "tuntap"}, {"veth", "veth"}, {"veth", "veth"}, {"tun-plain", "tuntap"}, {"tun", "tuntap"}, {"auto", "veth"}, {"tun", "tuntap"},
	} {
		dir := t.TempDir()
		d := s.start(t, dir, "--attach", want.attach)
		d.configure(t, 1)
		s.do(t, func() error {
			vr0, err := netlink.LinkByName("vr0")
			if err == nil && (vr0.Type() != want.kind || vr0.Attrs().MTU != 1480) {
				t.Errorf("--attach %s: vr0 is a %s with MTU %d", want.attach, vr0.Type(), vr0.Attrs().MTU)
			}
			return err
		})
		for _, attach := range []string{"tun", "veth"} {
			other := t.TempDir()
			s.do(t, func() error {
				expectRefused(t, command("--socket", filepath.Join(other, "vrouter.sock"), "--state-dir", other, "--attach", attach), "another process")
				return nil
			})
		}
		d.stop(t, syscall.SIGTERM)
	}
	for _, attach := range []string{"tun", "veth"} {
		other := t.TempDir()
		s.do(t, func() error {
			expectRefused(t, command("--socket", filepath.Join(other, "vrouter.sock"), "--state-dir", other, "--attach", attach, "--tun", "eth0"),
				"an interface of that name and another kind is there")
			return nil
		})
	}
}

// TestRefused: what the capabilities, the limits or the devices do not allow is refused at start, with what to do or to
// choose instead.
func TestRefused(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	const (
		noBPF  = "-all,+net_admin,+net_raw"
		noLock = "-all,+net_admin,+net_raw,+bpf"
		orVeth = "add the capabilities BPF and NET_ADMIN, or choose --attach veth"
		orAF   = "add the capabilities BPF and NET_ADMIN, or choose --io packet"
		lock   = "raise the limit of locked memory (ulimit -l), add the capability IPC_LOCK, lower --xdp-frames, or choose --io packet"
	)
	for _, c := range []struct{ capabilities, args, want string }{
		{noBPF, "--attach auto --io xdp", orAF},
		{noBPF, "--attach tun --io xdp", orAF},
		{noBPF, "--attach tun --io xdp --queues 2", orAF},
		{noBPF, "--attach veth --io xdp", orAF},
		{noBPF, "--attach direct", "BPF for --attach direct: operation not permitted: " + orVeth},
		{noBPF, "--attach direct --io xdp", "BPF for --attach direct --io xdp: operation not permitted: " + orVeth},
		{noBPF, "--attach direct --io tc", "BPF for --attach direct --io tc: operation not permitted: " + orVeth},
		{noBPF, "--attach direct --io tc --queues 2", "BPF for --attach direct --io tc: operation not permitted: " + orVeth},
		{noLock, "--attach tun --io xdp", lock},
		{noLock, "--attach veth --io xdp", lock},
		{noLock, "--attach direct --io xdp", lock},
		{"-all,+net_admin", "--attach auto", "run as root, or with the capabilities NET_ADMIN and NET_RAW"},
		{"-all,+net_raw", "--attach auto", "run as root, or with the capabilities NET_ADMIN and NET_RAW"},
		{"-all,+net_raw", "--attach veth --queues 2", "run as root, or with the capabilities NET_ADMIN and NET_RAW"},
		{"+all", "--attach veth --tun taken", "taken-io is there: remove it, or choose another --tun"},
		{"+all", "--attach auto --tun other", "an interface of that name and another kind is there: remove it, or choose another --tun"},
	} {
		s := newSpace(t)
		dir := t.TempDir()
		cmd := exec.Command("prlimit", append([]string{"--memlock=65536", "setpriv", "--bounding-set", c.capabilities, exe,
			"--socket", filepath.Join(dir, "vrouter.sock"), "--state-dir", dir}, strings.Fields(c.args)...)...)
		cmd.Env = append(os.Environ(), "MARGAY_TEST_VROUTER=1")
		s.do(t, func() error {
			if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "other"}, PeerName: "taken-io"}); err != nil {
				return err
			}
			expectRefused(t, cmd, c.want)
			return nil
		})
	}
}

// withoutTUN returns a command that runs the vrouter where there is no /dev/net/tun.
func withoutTUN(exe string, args ...string) *exec.Cmd {
	cmd := exec.Command("unshare", append([]string{"-m", "sh", "-c", `mount -t tmpfs none /dev/net && exec "$0" "$@"`, exe}, args...)...)
	cmd.Env = append(os.Environ(), "MARGAY_TEST_VROUTER=1")
	return cmd
}

// TestWithoutTUN: the default attachment needs no TUN device.
func TestWithoutTUN(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := newSpace(t)
	dir := t.TempDir()
	d := &daemon{dir: dir, cmd: withoutTUN(exe, "--socket", filepath.Join(dir, "vrouter.sock"), "--state-dir", dir)}
	d.cmd.Stdout, d.cmd.Stderr = &d.output, &d.output
	s.do(t, d.cmd.Start)
	t.Cleanup(func() { d.stop(t, syscall.SIGTERM) })
	c := d.dial(t)
	eventually(t, "vrouter answers", func() bool {
		status, err := c.Status(t.Context())
		return err == nil && strings.HasPrefix(status.Port, "vr0 by veth, packet (auto: this kernel has what it needs)")
	})
}

func TestMissing(t *testing.T) {
	s := newSpace(t)
	s.do(t, func() error {
		dir := t.TempDir()
		args := []string{"--socket", filepath.Join(dir, "vrouter.sock"), "--state-dir", dir}

		// In a user namespace of its own the process has no capability over this network.
		cmd := command(args...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER}
		expectRefused(t, cmd, "run as root")

		exe, err := os.Executable()
		if err != nil {
			return err
		}
		expectRefused(t, withoutTUN(exe, append(args, "--attach", "tun")...), "no /dev/net/tun")

		if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
		return nil
	})
}
