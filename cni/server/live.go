package server

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"

	"margay/internal/dump"
)

// Live lists the attachments whose interface is there, as the kernel says: a container that went away with its namespace
// and without a DEL is not among them. It fails before Reconcile has succeeded.
func (s *Server) Live() ([]Attachment, error) {
	s.mu.Lock()
	reconciled := s.reconciled
	s.mu.Unlock()
	if !reconciled {
		return nil, errors.New("cni server: the host's side of the pods has not been looked at yet")
	}
	links, err := dump.Links(s.nl)
	if err != nil {
		return nil, fmt.Errorf("cni server: list interfaces: %w", err)
	}
	var out []Attachment
	for _, link := range links {
		if a, ok := parseAlias(link.Attrs().Name, link.Attrs().Alias); ok {
			out = append(out, a)
		}
	}
	return out, nil
}

// Forget drops the attachments that had one of the addresses, which were released, and have no interface any more.
func (s *Server) Forget(released []netip.Addr) error {
	s.world.RLock()
	defer s.world.RUnlock()
	var errs []error
	for _, a := range s.Attachments() {
		if !slices.ContainsFunc(a.addresses(), func(addr netip.Addr) bool { return slices.Contains(released, addr) }) {
			continue
		}
		errs = append(errs, s.forget(a))
	}
	return errors.Join(errs...)
}

func (s *Server) forget(a Attachment) error {
	defer s.locks.lock(a.Handle())()
	s.mu.Lock()
	current := s.attachments[a.Handle()] == a
	s.mu.Unlock()
	_, err := s.nl.LinkByName(a.HostName)
	if !current || !errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil // it was attached again meanwhile
	}
	if err := s.fw.change(nil, a.keys()); err != nil {
		return err
	}
	s.mu.Lock()
	delete(s.attachments, a.Handle())
	s.mu.Unlock()
	s.tell(false, a)
	s.log.Warn("pod went away without a DEL", "container", a.ContainerID, "addresses", a.addresses(), "interface", a.HostName)
	return nil
}
