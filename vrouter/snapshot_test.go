package vrouter

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func encoded(t testing.TB, s Saved) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := EncodeSaved(&b, s); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestSavedRoundTrip(t *testing.T) {
	full := testRouter(t)
	full.End()
	for name, s := range map[string]Saved{"full": full.Save(), "empty": New().Save()} {
		got, err := DecodeSaved(bytes.NewReader(encoded(t, s)))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		// Restored and saved again, it is the same.
		r := New()
		if err := r.Restore(got); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if d := cmp.Diff(encoded(t, s), encoded(t, r.Save())); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		if status := r.Status(); status.Restored != (name == "full") || status.Stale != status.Routes+status.Nodes+status.Pods {
			t.Errorf("%s: %+v", name, status)
		}
	}
}

// TestSavedDamaged changes each byte in turn, and cuts at each: never a state, always an error.
func TestSavedDamaged(t *testing.T) {
	good := encoded(t, testRouter(t).Save())
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 0x10
		if _, err := DecodeSaved(bytes.NewReader(bad)); err == nil {
			t.Errorf("byte %d changed: no error", i)
		}
		if _, err := DecodeSaved(bytes.NewReader(good[:i])); err == nil {
			t.Errorf("cut at %d: no error", i)
		}
	}
}

func TestRestoreOnlyOnce(t *testing.T) {
	r := testRouter(t)
	if err := r.Restore(r.Save()); err == nil {
		t.Error("restored over a state")
	}
}

func FuzzDecodeSaved(f *testing.F) {
	f.Add(encoded(f, testRouter(f).Save()))
	f.Add([]byte(savedMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		saved, err := DecodeSaved(bytes.NewReader(b))
		if err != nil {
			return
		}
		// Whatever was read, the router takes it whole or refuses it.
		r := New()
		if err := r.Restore(saved); err != nil {
			if s := r.Status(); s != (Status{}) {
				t.Fatalf("refused with %v, and left %+v", err, s)
			}
		}
	})
}

func TestKeeper(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fib.snapshot")
	var logged strings.Builder
	log := slog.New(slog.NewTextHandler(&logged, nil))

	r := New()
	k := NewKeeper(r, path, log)
	k.Load()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		k.Run(ctx)
	}()
	if err := r.Update(testUpdate()); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(path); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no file after a minute")
		}
	}
	// A change just before the end is in the file too.
	r.End()
	cancel()
	<-done
	again := New()
	NewKeeper(again, path, log).Load()
	if s := again.Status(); !s.Restored || s.Routes != 5 || s.Nodes != 3 || s.Config != *testUpdate().Config {
		t.Errorf("restored %+v", s)
	}
	if files, err := os.ReadDir(filepath.Dir(path)); err != nil || len(files) != 1 {
		t.Errorf("files %v, %v: expected the snapshot alone", files, err)
	}

	if err := os.WriteFile(path, []byte("garbage, and more of it than a header has"), 0o600); err != nil {
		t.Fatal(err)
	}
	empty := New()
	NewKeeper(empty, path, log).Load()
	if s := empty.Status(); s.Restored || s.Configured || s.Routes != 0 {
		t.Errorf("from garbage: %+v", s)
	}
	if text := logged.String(); !strings.Contains(text, "no snapshot") || !strings.Contains(text, "snapshot ignored") {
		t.Errorf("log: %s", text)
	}
}

// TestKeeperCannotWrite: a directory that is gone is logged, and ends nothing.
func TestKeeperCannotWrite(t *testing.T) {
	k := NewKeeper(New(), filepath.Join(t.TempDir(), "gone", "fib.snapshot"), slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err := k.write(Saved{}); err == nil {
		t.Error("no error")
	}
	k.save()
}
