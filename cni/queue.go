package cni

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// A Queue is a directory of DELs that wait for the agent: one file per attachment, whose name follows from the
// handle, so that repeated DELs of one attachment are one file.
type Queue struct{ Dir string }

const queueSuffix = ".json"

// Path is the file in which a DEL of the request's attachment waits.
func (q Queue) Path(req *Request) string {
	sum := sha256.Sum256([]byte(req.Handle()))
	return filepath.Join(q.Dir, hex.EncodeToString(sum[:16])+queueSuffix)
}

// Put stores a DEL durably and atomically. The directory is made when missing.
func (q Queue) Put(req *Request) (err error) {
	r := *req
	r.Verb, r.Protocol, r.Expect, r.Valid = Del, Protocol, nil, nil
	data, err := json.Marshal(&r)
	if err != nil {
		return fmt.Errorf("encode DEL: %w", err)
	}
	if err := os.MkdirAll(q.Dir, 0o700); err != nil {
		return fmt.Errorf("queue DEL: %w", err)
	}
	f, err := os.CreateTemp(q.Dir, ".tmp-")
	if err != nil {
		return fmt.Errorf("queue DEL: %w", err)
	}
	defer func() {
		f.Close() // closed already on success, where the second close is a harmless error
		if err != nil {
			os.Remove(f.Name())
			err = fmt.Errorf("queue DEL: %w", err)
		}
	}()
	if _, err = f.Write(data); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), q.Path(req)); err != nil {
		return err
	}
	// Without a sync of the directory a power loss could undo the rename after the runtime was told "deleted".
	d, err := os.Open(q.Dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// List names the waiting files, in no meaningful order; a missing directory is an empty queue.
func (q Queue) List() ([]string, error) {
	entries, err := os.ReadDir(q.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read queue of DELs: %w", err)
	}
	var paths []string
	for _, e := range entries {
		if e.Type().IsRegular() && strings.HasSuffix(e.Name(), queueSuffix) && !strings.HasPrefix(e.Name(), ".") {
			paths = append(paths, filepath.Join(q.Dir, e.Name()))
		}
	}
	return paths, nil
}

// Load reads one waiting DEL. A file that holds no valid DEL is set aside under another name, so that it does not
// come up again, and an error tells so. A file that is gone meanwhile gives fs.ErrNotExist.
func (q Queue) Load(path string) (*Request, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read queued DEL: %w", err)
	}
	req, err := ReadRequest(bytes.NewReader(data))
	if err == nil && req.Verb != Del {
		err = fmt.Errorf("verb: %q, expected DEL", req.Verb)
	}
	if err != nil {
		aside := strings.TrimSuffix(path, queueSuffix) + ".bad"
		return nil, errors.Join(fmt.Errorf("queued DEL %s, set aside as %s: %w", path, aside, err), os.Rename(path, aside))
	}
	return req, nil
}

// Remove forgets a DEL that was carried out; one that is gone already is no error.
func (q Queue) Remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove queued DEL: %w", err)
	}
	return nil
}
