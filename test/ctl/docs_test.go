package ctl

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/tools/txtar"

	"margay/datastore"
	"margay/datastore/embedded"
)

// TestDocs runs the examples of the pages that are about margayctl, each page as one script against a datastore of its own.
//
// A block marked console holds commands, each after "$ ", with all that they print, on either output; "(exit status 1)"
// ends what a failing one prints. A block marked yaml whose first line is "# FILE" is that file.
func TestDocs(t *testing.T) {
	for _, page := range []string{"margayctl.md"} {
		t.Run(page, func(t *testing.T) {
			text, err := os.ReadFile(filepath.Join("../../docs", page))
			if err != nil {
				t.Fatal(err)
			}
			script, commands := scriptOf(t, string(text))
			if commands < 20 {
				t.Fatalf("only %d commands found", commands)
			}
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "docs.txtar"), txtar.Format(script), 0o644); err != nil {
				t.Fatal(err)
			}
			stores := []string{serve(t), serve(t)}
			testscript.Run(t, testscript.Params{Dir: dir, Setup: func(env *testscript.Env) error {
				env.Setenv("DATASTORE_TYPE", "etcdv3")
				env.Setenv("ETCD_ENDPOINTS", stores[0])
				for i, name := range []string{"old.cfg", "new.cfg"} {
					if err := os.WriteFile(filepath.Join(env.WorkDir, name), fmt.Appendf(nil, "spec: {etcdEndpoints: %q}\n", stores[i]), 0o644); err != nil {
						return err
					}
				}
				// A cluster that somebody has begun with.
				s, err := datastore.Open(t.Context(), datastore.Config{Endpoints: stores[:1]})
				if err != nil {
					return err
				}
				defer s.Close()
				return datastore.Initialize(t.Context(), s)
			}})
		})
	}
}

// scriptOf turns a page into a testscript, and counts its commands.
func scriptOf(t *testing.T, page string) (*txtar.Archive, int) {
	t.Helper()
	script := &txtar.Archive{}
	var run strings.Builder
	commands := 0
	for _, block := range strings.Split(page, "\n```")[1:] {
		kind, body, _ := strings.Cut(block, "\n")
		switch {
		case kind == "yaml" && strings.HasPrefix(body, "# "):
			name, _, _ := strings.Cut(strings.TrimPrefix(body, "# "), "\n")
			script.Files = append(script.Files, txtar.File{Name: name, Data: []byte(body + "\n")})
		case kind == "console":
			if !strings.HasPrefix(body, "$ ") {
				t.Fatalf("a console block begins with %q", body)
			}
			for _, example := range strings.Split("\n"+body, "\n$ ")[1:] {
				commands++
				command, want, _ := strings.Cut(example, "\n")
				if want != "" {
					want += "\n"
				}
				want, fails := strings.CutSuffix(want, "(exit status 1)\n")
				sh, out := fmt.Sprintf("example%d.sh", commands), fmt.Sprintf("example%d.out", commands)
				script.Files = append(script.Files, txtar.File{Name: sh, Data: []byte(command + "\n")}, txtar.File{Name: out, Data: []byte(want)})
				fmt.Fprintf(&run, "# %s\n%sexec bash -euc 'exec 2>&1; . ./%s'\ncmp stdout %s\n", command, map[bool]string{true: "! "}[fails], sh, out)
			}
		}
	}
	script.Comment = []byte(run.String())
	return script, commands
}

// serve runs an etcd until the test is over.
func serve(t *testing.T) string {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, ended := make(chan string, 1), make(chan error, 1)
	dir := t.TempDir()
	go func() {
		ended <- embedded.Serve(ctx, embedded.Config{Dir: dir, ClientURLs: []string{"http://127.0.0.1:0"}, NoSync: true,
			Ready: func(urls []string) { ready <- urls[0] }})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	select {
	case url := <-ready:
		return url
	case err := <-ended:
		ended <- nil
		t.Fatal(err)
	}
	return ""
}
