package cluster

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestBadInput: each ends in one clear line on standard error and exit status 1.
func TestBadInput(t *testing.T) {
	dir := t.TempDir()
	manifest := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	pool := func(spec string) string {
		return "apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata: {name: bad}\nspec: " + spec + "\n"
	}
	// A user without rights must still be able to run the programs, wherever the checkout lies.
	public := filepath.Join(dir, "bin")
	if err := os.CopyFS(public, os.DirFS(bin)); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{filepath.Dir(dir), dir, public} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name string
		argv []string
		want string // in the line
		user uint32 // 0: root
	}{
		{"unknown flag", []string{"ipam", "show", "--nope"}, "unknown flag: --nope", 0},
		{"unknown command", []string{"frobnicate"}, `unknown command "frobnicate"`, 0},
		{"unknown kind", []string{"get", "spaceships"}, "spaceships", 0},
		{"unknown output", []string{"ipam", "show", "-o", "xml"}, `--output "xml"`, 0},
		{"lab name in use", []string{"lab", "up", "--name", labName}, labName, 0},
		{"lab unknown", []string{"lab", "status", "--name", "no-such-lab"}, "no-such-lab", 0},
		{"lab name malformed", []string{"lab", "up", "--name", "Bad_Name!"}, "Bad_Name!", 0},
		{"lab pool malformed", []string{"lab", "up", "--name", labName + "x", "--pool", "10.244.0.0/99"}, "10.244.0.0/99", 0},
		{"lab mode malformed", []string{"lab", "up", "--name", labName + "x", "--ipip-mode", "Sometimes"}, "Sometimes", 0},
		{"lab attachment unknown", []string{"lab", "up", "--name", labName + "x", "--attach", "tap"}, "tap", 0},
		{"lab nodes out of range", []string{"lab", "up", "--name", labName + "x", "--nodes", "0"}, "nodes", 0},
		{"no root", []string{"lab", "up", "--name", labName + "x"}, "root", 65534},
		{"pool cidr malformed", []string{"apply", "-f", manifest("a.yaml", pool("{cidr: 10.0.0.0/33}"))}, "spec.cidr", 0},
		{"pool cidr with host bits", []string{"apply", "-f", manifest("b.yaml", pool("{cidr: 10.99.0.1/16}"))}, "10.99.0.0/16", 0},
		{"pool mode unknown", []string{"apply", "-f", manifest("c.yaml", pool("{cidr: 10.99.0.0/16, ipipMode: Often}"))}, "spec.ipipMode", 0},
		{"pool blockSize out of range", []string{"apply", "-f", manifest("d.yaml", pool("{cidr: 10.99.0.0/16, blockSize: 8}"))}, "spec.blockSize", 0},
		{"pool field unknown", []string{"apply", "-f", manifest("e.yaml", pool("{cidr: 10.99.0.0/16, colour: red}"))}, "colour", 0},
		{"pool overlaps", []string{"create", "-f", manifest("f.yaml", pool("{cidr: 10.244.128.0/17}"))}, "overlap", 0},
		{"manifest is no YAML", []string{"apply", "-f", manifest("g.yaml", "{{{")}, "g.yaml", 0},
		{"manifest missing", []string{"apply", "-f", filepath.Join(dir, "none.yaml")}, "none.yaml", 0},
		{"patch is no object", []string{"patch", "ippool", "default-ipv4-ippool", "-p", "7"}, "--patch", 0},
		{"patch changes the cidr", []string{"patch", "ippool", "default-ipv4-ippool", "-p", `{"spec":{"cidr":"10.9.0.0/16"}}`}, "cidr", 0},
		{"resource missing", []string{"get", "ippool", "nope"}, "nope", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cmd := exec.Command(filepath.Join(public, "margayctl"), tc.argv...)
			if tc.user != 0 {
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: tc.user, Gid: tc.user}}
			}
			cmd.Env = append(os.Environ(), "ETCD_ENDPOINTS="+strings.Join(status(t).Etcd, ","))
			var out, errs bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &errs
			_ = cmd.Run() // the exit code says it
			line := errs.String()
			if code := cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(line, tc.want) || strings.Count(line, "\n") != 1 || out.Len() != 0 {
				t.Errorf("expected exit 1 and one line that names %q, got exit %d, stderr:\n%s\nstdout:\n%s", tc.want, code, line, out.String())
			}
		})
	}
	if out, _ := ctl("lab", "status", "--name", labName+"x"); !strings.Contains(out, labName+"x") {
		t.Errorf("a refused lab left something behind: %s", out)
	}
}

// TestDaemonsSayWhatIsMissing: a daemon that cannot work ends at its start, with one line that says what to do.
func TestDaemonsSayWhatIsMissing(t *testing.T) {
	dir := t.TempDir()
	noTUN := []string{"unshare", "--mount", "--net", "sh", "-c", `mount -t tmpfs none /dev/net && exec "$0" "$@"`}
	daemon := func(name string, args ...string) []string {
		return append([]string{filepath.Join(bin, name)}, append(args, "--state-dir", dir)...)
	}
	for name, tc := range map[string]struct {
		argv []string
		want string
	}{
		"vrouter without /dev/net/tun": {append(noTUN, daemon("vrouter", "--attach", "tun", "--socket", filepath.Join(dir, "v.sock"))...), "/dev/net/tun"},
		"lab without /dev/net/tun":     {append(noTUN, filepath.Join(bin, "margayctl"), "lab", "up", "--name", labName+"y", "--attach", "direct"), "/dev/net/tun"},
		"agent without etcd": {append([]string{"ip", "netns", "exec", labName + "-underlay"},
			daemon("margay-agent", "--run-dir", dir, "--ip-autodetection-method", "interface=br0", "--etcd-endpoints", "http://127.0.0.1:1")...), "not reachable"},
		"agent with a method unknown": {daemon("margay-agent", "--run-dir", dir, "--ip-autodetection-method", "guess", "--etcd-endpoints", "http://127.0.0.1:1"), "first-found"},
		"agent with a bad level":      {daemon("margay-agent", "--log-level", "loud"), "--log-level"},
		"etcd on a URL that is none":  {[]string{filepath.Join(bin, "margay-agent"), "etcd", "--data-dir", dir, "--listen-client", "nonsense"}, "nonsense"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command(tc.argv[0], tc.argv[1:]...)
			var errs bytes.Buffer
			cmd.Stderr = &errs
			_ = cmd.Run() // the exit code says it
			lines := strings.Split(strings.TrimSpace(errs.String()), "\n")
			last := lines[len(lines)-1]
			if code := cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(last, tc.want) || strings.HasPrefix(last, "time=") {
				t.Errorf("expected exit 1 and a last line that names %q, got exit %d:\n%s", tc.want, code, errs.String())
			}
		})
	}
}

// TestPluginBadInput: the plugin's errors are JSON on standard output, as the CNI specification demands.
func TestPluginBadInput(t *testing.T) {
	for name, conf := range map[string]string{"not JSON": "this is no conflist", "empty": "", "no name": `{"cniVersion":"1.0.0","type":"margay"}`} {
		cmd := exec.Command(filepath.Join(bin, "margay-cni"))
		cmd.Env = []string{"CNI_COMMAND=ADD", "CNI_CONTAINERID=x", "CNI_NETNS=/run/netns/none", "CNI_IFNAME=eth0", "CNI_PATH=" + bin}
		cmd.Stdin = strings.NewReader(conf)
		out, err := cmd.Output()
		if err == nil || !bytes.Contains(out, []byte(`"code"`)) || !bytes.Contains(out, []byte(`"msg"`)) {
			t.Errorf("%s: expected exit 1 and a CNI error, got %v: %s", name, err, out)
		}
	}
}
