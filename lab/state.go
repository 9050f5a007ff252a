package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultDir is where labs keep their state: a file system that a reboot empties, as it does away with namespaces.
const DefaultDir = "/run/margay/lab"

// stateVersion is the layout of lab.json.
const stateVersion = 1

// ErrNotFound is returned for a lab, node or pod that does not exist.
var ErrNotFound = errors.New("not found")

// Host is the machine that labs are made on. The zero Host is this one.
type Host struct {
	Dir   string // where labs keep their state; empty: DefaultDir
	NetNS string // path of the namespace that is the host's; empty: the caller's
}

func (h Host) dir() string {
	if h.Dir == "" {
		return DefaultDir
	}
	return h.Dir
}

func (h Host) netns() string {
	if h.NetNS == "" {
		return ownNetNS
	}
	return h.NetNS
}

// Phases of a lab.
const (
	phaseStarting = "starting"
	phaseUp       = "up"
)

// state is what lab.json holds.
type state struct {
	Version int          `json:"version"`
	Name    string       `json:"name"`
	Created time.Time    `json:"created"`
	Phase   string       `json:"phase"`
	Owner   Process      `json:"owner"` // who brings it up, while the phase is starting
	Subnet  netip.Prefix `json:"subnet"`
	MTU     int          `json:"mtu"` // of the underlay, bytes
	BinDir  string       `json:"binDir"`
	Attach  string       `json:"attach,omitempty"`  // the vrouters' --attach; empty: their default
	IO      string       `json:"io,omitempty"`      // the vrouters' --io; empty: their default
	Queues  int          `json:"queues,omitempty"`  // the vrouters' --queues; 0: their default
	Threads int          `json:"threads,omitempty"` // the vrouters' --threads-per-queue; 0: their default
	Etcd    Process      `json:"etcd"`
	Nodes   []*node      `json:"nodes"`
}

type node struct {
	Name    string     `json:"name"`
	Index   int        `json:"index"`
	Address netip.Addr `json:"address"`
	VRouter Process    `json:"vrouter"`
	Agent   Process    `json:"agent"`
	NextPod int        `json:"nextPod"` // names are never used twice
	Pods    []*pod     `json:"pods"`
}

type pod struct {
	Name        string     `json:"name"`
	ContainerID string     `json:"containerID"`
	Address     netip.Addr `json:"address,omitzero"` // unset until ADD has succeeded
}

// Lab is a handle of one lab. Its methods may be called by several processes at once.
type Lab struct {
	host Host
	name string
}

// Open returns the lab of that name, or ErrNotFound.
func (h Host) Open(name string) (*Lab, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	l := &Lab{host: h, name: name}
	_, err := l.load()
	return l, err
}

// Names lists the labs of this machine, half-made ones included.
func (h Host) Names() ([]string, error) {
	entries, err := os.ReadDir(h.dir())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && CheckName(e.Name()) == nil {
			names = append(names, e.Name())
		}
	}
	sort.Strings(names)
	return names, nil
}

// unknown is the error for a lab that does not exist; it names those that do.
func (h Host) unknown(name string) error {
	names, err := h.Names()
	if err != nil || len(names) == 0 {
		return fmt.Errorf("lab %q %w: there is no lab on this machine; `margayctl lab up` makes one", name, ErrNotFound)
	}
	return fmt.Errorf("lab %q %w: there is %s", name, ErrNotFound, strings.Join(names, ", "))
}

// Name returns the lab's name.
func (l *Lab) Name() string { return l.name }

// Dir returns the directory that holds everything the lab keeps in files.
func (l *Lab) Dir() string { return filepath.Join(l.host.dir(), l.name) }

func (l *Lab) stateFile() string { return filepath.Join(l.Dir(), "lab.json") }

// nodeDir is a node's directory: run/ for sockets, state/ for what survives a restart, logs/.
func (l *Lab) nodeDir(node string) string { return filepath.Join(l.Dir(), "nodes", node) }

func (l *Lab) runDir(node string) string  { return filepath.Join(l.nodeDir(node), "run") }
func (l *Lab) varDir(node string) string  { return filepath.Join(l.nodeDir(node), "state") }
func (l *Lab) logsDir(node string) string { return filepath.Join(l.nodeDir(node), "logs") }

// endpoint is etcd's client URL.
func (s *state) endpoint() string {
	return fmt.Sprintf("http://%s:%d", at(s.Subnet, etcdOctet), etcdPort)
}

// load reads lab.json: ErrNotFound when the lab does not exist, another error when the file is damaged.
func (l *Lab) load() (*state, error) {
	b, err := os.ReadFile(l.stateFile())
	if errors.Is(err, os.ErrNotExist) {
		if _, dirErr := os.Stat(l.Dir()); dirErr == nil {
			return nil, l.damaged("has no lab.json")
		}
		return nil, l.host.unknown(l.name)
	}
	if err != nil {
		return nil, err
	}
	var s state
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, l.damaged("has a damaged lab.json (" + err.Error() + ")")
	}
	if s.Version != stateVersion || s.Name != l.name || !s.Subnet.Addr().Is4() {
		return nil, l.damaged("was made by another version of margayctl")
	}
	return &s, nil
}

func (l *Lab) damaged(how string) error {
	return fmt.Errorf("lab %q %s: `margayctl lab down --name %s` removes it", l.name, how, l.name)
}

// save replaces lab.json as a whole, so that a crash leaves the old one or the new one.
func (l *Lab) save(s *state) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	tmp := l.stateFile() + ".tmp"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, l.stateFile())
}

// update changes lab.json under the host's lock. change must be quick: every lab of the machine waits for it.
func (l *Lab) update(change func(*state) error) error {
	unlock, err := l.host.lock()
	if err != nil {
		return err
	}
	defer unlock()
	s, err := l.load()
	if err != nil {
		return err
	}
	if err := change(s); err != nil {
		return err
	}
	return l.save(s)
}

// lock takes the host's lock, on the directory itself; the kernel gives it back when its holder dies.
func (h Host) lock() (unlock func(), err error) {
	for {
		if err := os.MkdirAll(h.dir(), 0o755); err != nil {
			return nil, err
		}
		f, err := os.Open(h.dir())
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
			if !errors.Is(err, unix.EINTR) {
				break
			}
		}
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", h.dir(), err)
		}
		// The last lab to go takes the directory along: what we have locked must still be the one with the name.
		mine, errMine := f.Stat()
		named, errNamed := os.Stat(h.dir())
		if errMine == nil && errNamed == nil && os.SameFile(mine, named) {
			return func() { f.Close() }, nil
		}
		f.Close()
	}
}

// tidy removes the directory of the labs once it is empty, and the one above if we made it.
func (h Host) tidy() error {
	unlock, err := h.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if os.Remove(h.dir()) == nil && h.dir() == DefaultDir {
		_ = os.Remove(filepath.Dir(DefaultDir)) // not empty where a node's own daemons run: then it stays
	}
	return nil
}

// node finds a node by its full name or by the part behind the lab's.
func (s *state) node(name string) (*node, error) {
	var known []string
	for _, full := range []string{name, s.Name + "-" + name} {
		for _, n := range s.Nodes {
			if n.Name == full {
				return n, nil
			}
		}
	}
	for _, n := range s.Nodes {
		known = append(known, n.Name)
	}
	return nil, fmt.Errorf("node %q %w in lab %q: expected one of %s", name, ErrNotFound, s.Name, strings.Join(known, ", "))
}

// pod finds a pod, and its node, by its full name or by the part behind the lab's.
func (s *state) pod(name string) (*node, *pod, error) {
	for _, full := range []string{name, s.Name + "-" + name} {
		for _, n := range s.Nodes {
			for _, p := range n.Pods {
				if p.Name == full {
					return n, p, nil
				}
			}
		}
	}
	return nil, nil, fmt.Errorf("pod %q %w in lab %q", name, ErrNotFound, s.Name)
}

// namespace finds the namespace of a node, a pod or the underlay by its full or short name.
func (s *state) namespace(name string) (string, error) {
	if n, err := s.node(name); err == nil {
		return n.Name, nil
	}
	if _, p, err := s.pod(name); err == nil {
		return p.Name, nil
	}
	if name == underlayName(s.Name) || name == "underlay" {
		return underlayName(s.Name), nil
	}
	return "", fmt.Errorf("%q %w: lab %q has no such node or pod", name, ErrNotFound, s.Name)
}
