package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
)

// Down removes a lab and all it has left on the machine. It works from what it finds, not only from what lab.json says,
// and so also after a crash at any point; ErrNotFound when nothing of that name is there.
func (h Host) Down(name string, progressTo io.Writer) error {
	if err := errors.Join(CheckName(name), needRoot()); err != nil {
		return err
	}
	l := &Lab{host: h, name: name}
	left, err := namespacesOf(name)
	if err != nil {
		return err
	}
	if _, err := os.Stat(l.Dir()); errors.Is(err, os.ErrNotExist) && len(left) == 0 {
		return errors.Join(h.unknown(name), h.tidy())
	}
	s, err := l.load()
	if err != nil {
		s = nil // damaged: the names tell enough
	}
	if s != nil && s.Phase == phaseStarting && s.Owner != self() && s.Owner.Alive() {
		return fmt.Errorf("lab %q is being brought up by process %d: end that one first, it clears away", name, s.Owner.PID)
	}
	return newProgress(progressTo).step("lab "+name+" removed", func() (string, error) {
		return fmt.Sprintf("%d namespace(s)", len(left)), l.remove(s)
	})
}

// DownAll removes every lab of the machine.
func (h Host) DownAll(progressTo io.Writer) error {
	names, err := h.Names()
	if err != nil {
		return err
	}
	if len(names) == 0 {
		newProgress(progressTo).say("there is no lab")
	}
	var errs []error
	for _, name := range names {
		if err := h.Down(name, progressTo); err != nil && !errors.Is(err, ErrNotFound) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// remove takes the lab apart; s may be nil. It goes on past errors, and may be called again.
func (l *Lab) remove(s *state) error {
	names, err := namespacesOf(l.name)
	errs := []error{err, l.kill(s, names), unplugHost(l.name)}
	for _, name := range names {
		errs = append(errs, deleteNetNS(name))
	}
	if err := errors.Join(errs...); err != nil {
		return err // the directory stays, so that the next attempt still finds the lab
	}
	if err := os.RemoveAll(l.Dir()); err != nil {
		return err
	}
	return l.host.tidy()
}

// kill ends the lab's processes: those on record, and any other in one of its namespaces.
func (l *Lab) kill(s *state, names []string) error {
	const rounds = 5 // a process may have started another between the listing and its own end
	spaces := map[inode]bool{}
	for _, name := range names {
		if ns, err := inodeOf(netnsPath(name)); err == nil && isNetNS(name) {
			spaces[ns] = true
		}
	}
	victims := s.processes()
	for range rounds {
		if len(spaces) > 0 {
			victims = append(victims, processesIn(spaces)...)
		}
		if len(victims) == 0 {
			return nil
		}
		var errs []error
		for _, p := range victims {
			errs = append(errs, p.stop(context.Background(), 0))
		}
		if err := errors.Join(errs...); err != nil {
			return err
		}
		victims = nil
	}
	return fmt.Errorf("lab %q: new processes keep appearing in its namespaces", l.name)
}

// isNetNS tells whether the name is a namespace by now, and not the plain file that it begins as.
func isNetNS(name string) bool {
	host, err := inodeOf(ownNetNS)
	if err != nil {
		return false
	}
	ns, err := inodeOf(netnsPath(name))
	return err == nil && ns.dev == host.dev
}

// processes lists what lab.json has on record.
func (s *state) processes() []Process {
	if s == nil {
		return nil
	}
	var all []Process
	add := func(p Process) {
		if p.PID > 0 {
			all = append(all, p)
		}
	}
	for _, n := range s.Nodes {
		add(n.Agent)
		add(n.VRouter)
	}
	add(s.Etcd)
	return all
}
