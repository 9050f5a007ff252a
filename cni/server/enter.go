package server

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
)

// netnsDirs are where container runtimes pin the network namespaces of pods: containerd, CRI-O, podman and `ip netns`, Docker.
var netnsDirs = []string{"/run/netns", "/run/docker/netns"}

// ErrNoNetns is returned by EnterPod for a pod whose network namespace is pinned nowhere that this process can see.
var ErrNoNetns = errors.New("its network namespace is not among those in /run/netns")

// EnterPod runs fn on a thread inside the network namespace of the pod whose interface has iface as its host's side, and tells
// it the index that the pod's side has there. fn must start no goroutines; what it opens stays in the namespace. It needs
// SYS_ADMIN.
func (s *Server) EnterPod(iface string, fn func(index int) error) error {
	link, err := s.nl.LinkByName(iface)
	if err != nil {
		return fmt.Errorf("interface %s: %w", iface, err)
	}
	ns, err := s.netnsOf(link)
	if err != nil {
		return fmt.Errorf("the pod behind %s: %w", iface, err)
	}
	defer ns.Close()
	return inNetns(ns, func() error { return fn(link.Attrs().ParentIndex) })
}

// netnsOf opens the network namespace of the other end of a veth. The kernel numbers the namespaces that a namespace has links
// to, and says which number a pinned one has.
func (s *Server) netnsOf(link netlink.Link) (*os.File, error) {
	id := link.Attrs().NetNsID
	for _, dir := range netnsDirs {
		files, err := filepath.Glob(dir + "/*")
		if err != nil || id < 0 {
			return nil, ErrNoNetns
		}
		for _, name := range files {
			f, err := os.Open(name)
			if err != nil {
				continue // gone since, or another's
			}
			if checkNetns(f) == nil {
				if its, err := s.nl.GetNetNsIdByFd(int(f.Fd())); err == nil && its == id {
					return f, nil
				}
			}
			f.Close()
		}
	}
	return nil, ErrNoNetns
}
