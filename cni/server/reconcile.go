package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"time"

	"margay/internal/dump"
)

const (
	// queuePoll is how often the directory of waiting DELs is looked at. Reading an empty directory costs
	// microseconds, and a DEL waits there only when the agent was away.
	queuePoll = time.Second
	// queueRetryMax bounds the pause between attempts when the datastore refuses.
	queueRetryMax = 30 * time.Second
	// drainTimeout bounds one pass over the queue.
	drainTimeout = 20 * time.Second
	// firewallPoll is how often the table is looked for.
	firewallPoll = 10 * time.Second
)

// Reconcile puts the host right after a restart: it finds the attachments by the interfaces' aliases, restores each
// one's sysctls and route, and writes the nftables table. Pods keep running while it does. An address that IPAM does
// not know under the attachment's handle is reported and left alone, for the pod is using it.
//
// It waits for the verbs under way, and they for it. It fails when the node cannot forward or nftables is missing; a single pod's trouble is logged.
func (s *Server) Reconcile(ctx context.Context) error {
	if err := forwardOnNode(); err != nil {
		return fmt.Errorf("cni server: %w", err)
	}
	// Half-made attachments would be taken for missing ones.
	s.world.Lock()
	defer s.world.Unlock()
	links, err := dump.Links(s.nl)
	if err != nil {
		return fmt.Errorf("cni server: list interfaces: %w", err)
	}
	found := map[string]Attachment{}
	var keys []podKey
	for _, link := range links {
		name := link.Attrs().Name
		a, ok := parseAlias(name, link.Attrs().Alias)
		if !ok || !strings.HasPrefix(name, hostPrefix) {
			continue
		}
		found[a.Handle()] = a
		keys = append(keys, a.keys()...)
	}
	// The rules first: they are what lets packets pass; the routes are most likely there already.
	if err := s.fw.setPods(keys); err != nil {
		return fmt.Errorf("cni server: %w", err)
	}
	for _, link := range links {
		a, ok := parseAlias(link.Attrs().Name, link.Attrs().Alias)
		if _, ours := found[a.Handle()]; !ok || !ours {
			continue
		}
		if err := s.setUpHost(a, link); err != nil {
			s.log.Error("restore pod", "interface", a.HostName, "container", a.ContainerID, "error", err)
		}
	}
	s.mu.Lock()
	s.attachments, s.reconciled = found, true
	s.mu.Unlock()
	for _, a := range found {
		s.tell(true, a)
	}
	// Nobody waits for IPAM's opinion, which takes a while where there are many pods.
	go s.confirm(ctx, slices.Collect(maps.Values(found)))
	return nil
}

// confirm compares what pods use with what IPAM holds for them, and says where they differ. It gives up at the first
// error: a datastore that is away would have each question wait.
func (s *Server) confirm(ctx context.Context, found []Attachment) {
	for _, a := range found {
		held, err := s.cfg.IPAM.Addresses(ctx, a.Handle())
		if err != nil {
			return
		}
		s.mu.Lock()
		current := s.attachments[a.Handle()] == a
		s.mu.Unlock()
		for _, addr := range a.addresses() {
			if current && !slices.Contains(held, addr) {
				s.log.Warn("pod uses an address that IPAM does not hold for it", "interface", a.HostName, "container", a.ContainerID,
					"address", addr, "held", held)
			}
		}
	}
}

// drain makes one pass over the waiting DELs, going on past errors, and tells whether none is left undone.
func (s *Server) drain(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	paths, err := s.queue.List()
	if err != nil {
		s.log.Error("queued DELs", "error", err)
		return false
	}
	done := true
	for _, path := range paths {
		if err := s.drainLocked(ctx, path); err != nil {
			s.log.Warn("queued DEL is tried again later", "file", path, "error", err)
			done = false
		}
	}
	return done
}

// drainLocked learns from the file which lock to take, then reads it again under the lock: meanwhile an ADD of the
// same container may have carried it out.
func (s *Server) drainLocked(ctx context.Context, path string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	req, err := s.queue.Load(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		s.log.Error("queued DEL cannot be read", "error", err)
		return nil
	}
	s.world.RLock()
	defer s.world.RUnlock()
	defer s.locks.lock(req.Handle())()
	return s.drainOne(ctx, path)
}

// housekeeping looks after the queue and the table until ctx is done.
func (s *Server) housekeeping(ctx context.Context) {
	pause := queuePoll
	queue := time.NewTimer(pause)
	defer queue.Stop()
	table := time.NewTicker(firewallPoll)
	defer table.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-queue.C:
			if s.drain(ctx) {
				pause = queuePoll
			} else {
				pause = min(2*pause, queueRetryMax)
			}
			queue.Reset(pause)
		case <-table.C:
			if repaired, err := s.fw.ensure(); err != nil {
				s.log.Error("nftables table cannot be restored: pods are cut off", "error", err)
			} else if repaired {
				s.log.Warn("nftables table was removed by someone and is restored", "table", "inet "+fwTable)
			}
		}
	}
}
