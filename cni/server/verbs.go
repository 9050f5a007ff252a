package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"

	"margay/cni"
)

// handle carries out one verb. A panic is the request's error, not the agent's end.
func (s *Server) handle(ctx context.Context, req *cni.Request, ns *os.File) (a *cni.Attachment, err error) {
	defer func() {
		if r := recover(); r != nil {
			s.log.Error("panic while serving CNI", "verb", req.Verb, "container", req.ContainerID, "panic", r, "stack", string(debug.Stack()))
			a, err = nil, fmt.Errorf("margay-agent: panic: %v", r)
		}
	}()
	s.world.RLock()
	defer s.world.RUnlock()
	switch req.Verb {
	case cni.Add:
		if a, err = s.add(ctx, req, ns); err != nil {
			s.log.Warn("CNI ADD failed", "container", req.ContainerID, "pod", req.Pod.Namespace+"/"+req.Pod.Name, "error", err)
		}
		return a, err
	case cni.Del:
		return nil, s.del(ctx, req)
	case cni.Check:
		return nil, s.check(ctx, req, ns)
	case cni.GC:
		return nil, s.gc(ctx, req)
	default: // STATUS; the request was validated
		if err := s.cfg.Ready(); err != nil {
			return nil, types.NewError(types.ErrPluginNotAvailable, "margay-agent is not ready: "+err.Error(), "")
		}
		return nil, nil
	}
}

func (s *Server) add(ctx context.Context, req *cni.Request, ns *os.File) (*cni.Attachment, error) {
	if err := requireNetns(req, ns); err != nil {
		return nil, err
	}
	handle := req.Handle()
	defer s.locks.lock(handle)()

	pod, err := podHandle(ns)
	if err != nil {
		return nil, types.NewError(cni.CodePlumbing, err.Error(), "")
	}
	defer pod.Close()
	if err := s.refuseExisting(ctx, req, pod); err != nil {
		return nil, err
	}
	if err := s.cfg.Ready(); err != nil {
		return nil, types.NewError(types.ErrTryAgainLater, "margay-agent is not ready: "+err.Error(), "")
	}
	// A DEL of this very container that still waits would take the new address away.
	if err := s.drainOne(ctx, s.queue.Path(req)); err != nil {
		return nil, types.NewError(types.ErrTryAgainLater, "an earlier DEL of this container is not done yet: "+err.Error(), "")
	}
	addrs, err := s.assign(ctx, req)
	if err != nil {
		return nil, cni.AsError(err, cni.CodeIPAM)
	}
	a := Attachment{Network: req.Network, ContainerID: req.ContainerID, IfName: req.IfName, HostName: req.HostName()}
	if !a.setAddresses(addrs) {
		s.undo(ctx, a)
		return nil, types.NewError(cni.CodeIPAM, fmt.Sprintf("addresses %v: expected one, or one of each family", addrs), "")
	}
	if other, taken := s.living(a); taken {
		// Plumbing would take the route from a pod that is there. It gets the next address at the next attempt.
		if err := s.cfg.IPAM.Release(ctx, handle); err != nil {
			s.log.Error("clean-up after a failed ADD", "container", a.ContainerID, "addresses", a.addresses(), "error", err)
		}
		return nil, types.NewError(types.ErrTryAgainLater, fmt.Sprintf("addresses %v: container %s on this node has one of them already, though the datastore says that it is free",
			a.addresses(), other.ContainerID), "")
	}
	mtu := req.MTU
	if mtu == 0 {
		mtu = s.cfg.MTU()
	}
	mac, err := s.attach(a, ns, pod, mtu, req.MAC)
	if err != nil {
		s.undo(ctx, a)
		return nil, types.NewError(cni.CodePlumbing, err.Error(), "")
	}
	s.mu.Lock()
	s.attachments[handle] = a
	s.mu.Unlock()
	s.tell(true, a)
	s.log.Info("pod attached", "container", req.ContainerID, "pod", req.Pod.Namespace+"/"+req.Pod.Name, "addresses", addrs, "interface", a.HostName)
	out := &cni.Attachment{HostName: a.HostName, HostMAC: gatewayMAC.String(), PodMAC: mac, Address: a.Address, Address6: a.Address6, MTU: mtu}
	if a.Address.IsValid() {
		out.Gateway = gateway
	}
	if a.Address6.IsValid() {
		out.Gateway6 = gateway6
	}
	return out, nil
}

// living finds another pod with an interface here that has an address of a.
func (s *Server) living(a Attachment) (Attachment, bool) {
	for _, b := range s.Attachments() {
		if b.Handle() == a.Handle() || !slices.ContainsFunc(a.addresses(), func(x netip.Addr) bool { return slices.Contains(b.addresses(), x) }) {
			continue
		}
		link, err := s.nl.LinkByName(b.HostName)
		if err != nil {
			continue // gone with its namespace
		}
		if now, ok := parseAlias(b.HostName, link.Attrs().Alias); ok && now.Handle() == b.Handle() {
			return b, true
		}
	}
	return Attachment{}, false
}

// tell says that a pod came or went.
func (s *Server) tell(added bool, a Attachment) {
	if a.Address.IsValid() {
		s.cfg.OnPod(added, a.Address, a.HostName)
	}
}

func requireNetns(req *cni.Request, ns *os.File) error {
	if ns == nil {
		return types.NewError(types.ErrInvalidNetNS, "CNI_NETNS: no namespace came with the request", "")
	}
	if err := checkNetns(ns); err != nil {
		return types.NewError(types.ErrInvalidNetNS, fmt.Sprintf("CNI_NETNS: %s: %v", req.Netns, err), "")
	}
	return nil
}

// refuseExisting keeps an attachment that is there as it is, also when the runtime now names another namespace. One
// whose interface went away with its namespace, without a DEL, is taken apart.
func (s *Server) refuseExisting(ctx context.Context, req *cni.Request, pod *netlink.Handle) error {
	refuse := func(where string) error {
		return types.NewError(cni.CodeExists, fmt.Sprintf("container %s: interface %s exists already", req.ContainerID, req.IfName), where)
	}
	exists, err := hasInterface(pod, req.IfName)
	if err != nil {
		return types.NewError(cni.CodePlumbing, "look for "+req.IfName+" in the container: "+err.Error(), "")
	}
	if exists {
		return refuse("in " + req.Netns)
	}
	s.mu.Lock()
	a, known := s.attachments[req.Handle()]
	s.mu.Unlock()
	if !known {
		return nil
	}
	link, err := s.nl.LinkByName(a.HostName)
	if err == nil {
		if b, ok := parseAlias(a.HostName, link.Attrs().Alias); ok && b.Handle() == a.Handle() {
			return refuse(fmt.Sprintf("with %v, host side %s", a.addresses(), a.HostName))
		}
	}
	return s.detach(ctx, req)
}

// assign gets the addresses. What the handle holds already, though the container has no such interface, is left from an
// ADD that was cut short: it is released and asked for again.
func (s *Server) assign(ctx context.Context, req *cni.Request) ([]netip.Addr, error) {
	r := AssignRequest{Handle: req.Handle(), Namespace: req.Pod.Namespace, Pod: req.Pod.Name, ContainerID: req.ContainerID,
		Node: s.cfg.Node, IPv4: req.IPv4, IPv6: req.IPv6}
	addrs, err := s.cfg.IPAM.Assign(ctx, r)
	if err == nil {
		return addrs, nil
	}
	held, herr := s.cfg.IPAM.Addresses(ctx, r.Handle)
	if herr != nil || len(held) == 0 {
		return nil, err
	}
	s.log.Warn("address left from an earlier ADD is given back", "handle", r.Handle, "addresses", held)
	if err := s.cfg.IPAM.Release(ctx, r.Handle); err != nil {
		return nil, err
	}
	return s.cfg.IPAM.Assign(ctx, r)
}

// attach does the plumbing. On error the caller undoes it.
func (s *Server) attach(a Attachment, ns *os.File, pod *netlink.Handle, mtu int, wantMAC string) (mac string, err error) {
	s.plumb <- struct{}{}
	defer func() { <-s.plumb }()
	if err := s.replaceStale(a); err != nil {
		return "", err
	}
	// The rule comes first: from the first packet on, the pod is let through and nobody else.
	if err := s.fw.change(a.keys(), nil); err != nil {
		return "", err
	}
	host, err := s.createVeth(a, ns, mtu, wantMAC)
	if err != nil {
		return "", err
	}
	if err := s.setUpHost(a, host); err != nil {
		return "", err
	}
	return setUpPod(ns, pod, a)
}

// replaceStale removes an interface of the wanted name that belongs to an earlier container of the same pod. Its
// address stays with its handle until its own DEL.
func (s *Server) replaceStale(a Attachment) error {
	link, err := s.nl.LinkByName(a.HostName)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find %s: %w", a.HostName, err)
	}
	old, ours := parseAlias(a.HostName, link.Attrs().Alias)
	s.log.Info("interface of an earlier container is replaced", "interface", a.HostName, "container", old.ContainerID)
	if err := s.deleteLink(link); err != nil {
		return err
	}
	if ours {
		return s.fw.change(nil, old.keys())
	}
	return nil
}

// undo takes back a failed ADD. The request's own time may be over, so it gets some more.
func (s *Server) undo(ctx context.Context, a Attachment) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	if err := s.remove(ctx, a); err != nil {
		s.log.Error("clean-up after a failed ADD", "container", a.ContainerID, "addresses", a.addresses(), "error", err)
		req := cni.Request{Network: a.Network, ContainerID: a.ContainerID, IfName: a.IfName}
		if err := s.queue.Put(&req); err != nil {
			s.log.Error("clean-up after a failed ADD is lost", "container", a.ContainerID, "addresses", a.addresses(), "error", err)
		}
	}
}

// remove takes an attachment apart, the address last: as long as anything of it is left, no other pod gets it.
func (s *Server) remove(ctx context.Context, a Attachment) error {
	if err := s.removeHost(a); err != nil {
		return types.NewError(cni.CodePlumbing, err.Error(), "")
	}
	if err := s.fw.change(nil, a.keys()); err != nil {
		return types.NewError(cni.CodePlumbing, err.Error(), "")
	}
	if err := s.cfg.IPAM.Release(ctx, a.Handle()); err != nil {
		return fmt.Errorf("%w: %w", errRelease, err)
	}
	return nil
}

// errRelease: everything is gone but the address, which the datastore must be told of later.
var errRelease = errors.New("release address")

// detach does a DEL's work. What was never attached is detached already.
func (s *Server) detach(ctx context.Context, req *cni.Request) error {
	handle := req.Handle()
	s.mu.Lock()
	a, known := s.attachments[handle]
	s.mu.Unlock()
	if !known {
		a = Attachment{Network: req.Network, ContainerID: req.ContainerID, IfName: req.IfName, HostName: req.HostName()}
	}
	err := s.remove(ctx, a)
	if err != nil && !errors.Is(err, errRelease) {
		return err
	}
	s.mu.Lock()
	delete(s.attachments, handle)
	s.mu.Unlock()
	if known {
		s.tell(false, a)
		s.log.Info("pod detached", "container", req.ContainerID, "addresses", a.addresses(), "interface", a.HostName)
	}
	return err
}

// del answers DEL. When only the datastore is missing, the release is queued like a DEL that found no agent: the
// container is gone either way, and a runtime told otherwise would keep its corpse.
func (s *Server) del(ctx context.Context, req *cni.Request) error {
	defer s.locks.lock(req.Handle())()
	err := s.detach(ctx, req)
	if errors.Is(err, errRelease) {
		s.log.Warn("DEL: address will be released later", "container", req.ContainerID, "error", err)
		return s.queue.Put(req)
	}
	if err == nil {
		return s.queue.Remove(s.queue.Path(req))
	}
	return err
}

// drainOne carries out the waiting DEL in path, if there is one. The caller holds the handle's lock.
func (s *Server) drainOne(ctx context.Context, path string) error {
	req, err := s.queue.Load(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		s.log.Error("queued DEL cannot be read", "error", err)
		return nil
	}
	if err := s.detach(ctx, req); err != nil {
		return err
	}
	return s.queue.Remove(path)
}

// gc detaches what the runtime no longer lists, in this network only, and goes on past errors.
func (s *Server) gc(ctx context.Context, req *cni.Request) error {
	var errs []error
	for _, a := range s.Attachments() {
		keep := slices.ContainsFunc(req.Valid, func(v types.GCAttachment) bool {
			return v.ContainerID == a.ContainerID && v.IfName == a.IfName
		})
		if keep || a.Network != req.Network {
			continue
		}
		r := &cni.Request{Network: a.Network, ContainerID: a.ContainerID, IfName: a.IfName}
		if err := s.del(ctx, r); err != nil {
			errs = append(errs, fmt.Errorf("container %s: %w", a.ContainerID, err))
		}
	}
	return errors.Join(errs...)
}
