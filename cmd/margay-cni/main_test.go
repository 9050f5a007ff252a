package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The plugin runs as root for every pod that starts and stops; it stays small and free of what it does not need.
func TestLinksNoControlPlane(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for dep := range strings.Lines(string(out)) {
		for _, banned := range []string{"go.etcd.io/", "gobgp", "google.golang.org/grpc", "margay/cni/server", "google/nftables", "margay/agent"} {
			if strings.Contains(dep, banned) {
				t.Errorf("links %s", strings.TrimSpace(dep))
			}
		}
	}
}

func TestCommandLine(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "margay-cni")
	if out, err := exec.Command("go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	run := func(env []string, args ...string) (stdout, stderr string, code int) {
		cmd := exec.Command(bin, args...)
		cmd.Env = env
		var out, errOut bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errOut
		err := cmd.Run()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
	}
	if out, _, code := run(nil, "--version"); code != 0 || !strings.HasPrefix(out, "margay-cni ") {
		t.Errorf("--version: %d %q", code, out)
	}
	if out, _, code := run(nil, "--help"); code != 0 || !strings.Contains(out, "CNI_COMMAND") || strings.Contains(out, "%!") {
		t.Errorf("--help: %d %q", code, out)
	}
	if out, errOut, code := run(nil, "--frobnicate"); code != 1 || out != "" || strings.Count(errOut, "\n") != 1 || !strings.Contains(errOut, "--frobnicate") {
		t.Errorf("unknown flag: %d %q %q", code, out, errOut)
	}
	var e struct {
		Code int
		Msg  string
	}
	if out, _, code := run(nil); code != 1 || json.Unmarshal([]byte(out), &e) != nil || e.Code != 4 {
		t.Errorf("no environment: %d %q", code, out)
	}
	if out, _, code := run([]string{"CNI_COMMAND=FROB", "CNI_PATH=/"}); code != 1 || json.Unmarshal([]byte(out), &e) != nil {
		t.Errorf("unknown verb: %d %q", code, out)
	}
	var v struct{ SupportedVersions []string }
	out, _, code := run([]string{"CNI_COMMAND=VERSION"})
	if code != 0 || json.Unmarshal([]byte(out), &v) != nil || !slices.Equal(v.SupportedVersions, []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}) {
		t.Errorf("VERSION: %d %q", code, out)
	}
}
