package vrouter

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"
)

// saveDelay gathers the changes of one burst into one write of the file.
const saveDelay = 100 * time.Millisecond

// Keeper keeps a router's state in a file, so that it forwards again after a restart before the agent has said a word.
type Keeper struct {
	router *Router
	path   string
	log    *slog.Logger
}

// NewKeeper returns a keeper of r's state in the file path. Its directory must exist.
func NewKeeper(r *Router, path string, log *slog.Logger) *Keeper {
	return &Keeper{router: r, path: path, log: log}
}

// Load restores the router's state from the file. A file that is missing, damaged or no longer valid leaves the router
// empty and is no error to stop for; it is logged.
func (k *Keeper) Load() {
	err := k.load()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		k.log.Info("no snapshot: waiting for the agent", "file", k.path)
	case err != nil:
		k.log.Error("snapshot ignored: waiting for the agent", "file", k.path, "error", err)
	default:
		s := k.router.Status()
		k.log.Info("forwarding from the snapshot", "file", k.path, "routes", s.Routes, "nodes", s.Nodes,
			"configured", s.Configured, "complete", s.Restored)
	}
}

func (k *Keeper) load() error {
	f, err := os.Open(k.path)
	if err != nil {
		return err
	}
	defer f.Close()
	saved, err := DecodeSaved(bufio.NewReader(f))
	if err != nil {
		return err
	}
	return k.router.Restore(saved)
}

// Run writes the file after each change, and once more when ctx is done; then it returns. A write that fails is
// logged, and tried again at the next change.
func (k *Keeper) Run(ctx context.Context) {
	for {
		select {
		case <-k.router.Changed():
		case <-ctx.Done():
			k.save()
			return
		}
		select {
		case <-time.After(saveDelay):
		case <-ctx.Done():
		}
		// What changed during the delay is in this write.
		select {
		case <-k.router.Changed():
		default:
		}
		k.save()
	}
}

func (k *Keeper) save() {
	if err := k.write(k.router.Save()); err != nil {
		k.log.Error("snapshot not written", "file", k.path, "error", err)
	}
}

// write replaces the file in one step: a reader, or a power loss, finds the old one or the new one, whole.
func (k *Keeper) write(saved Saved) (err error) {
	dir := filepath.Dir(k.path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(k.path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	w := bufio.NewWriter(f)
	err = EncodeSaved(w, saved)
	if err == nil {
		err = w.Flush()
	}
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return err
	}
	if err = os.Rename(f.Name(), k.path); err != nil {
		return err
	}
	return syncDir(dir)
}

// syncDir makes the rename durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	defer d.Close()
	return d.Sync()
}
