package port

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// twinName is the name of the other end of the pair whose end for the kernel has this name.
func twinName(name string) string { return name[:min(len(name), 12)] + "-io" }

// holdDevice makes this process the only one that has the device, in the calling thread's namespace: nothing about a veth
// itself, nor about a TUN device of several queues, would keep two vRouters apart. The hold ends with the descriptor, and
// with the process.
func holdDevice(name string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("device %s: %w", name, err)
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: "@margay-vrouter/" + name}); err != nil {
		_ = unix.Close(fd)
		if errors.Is(err, unix.EADDRINUSE) {
			err = unix.EBUSY
		}
		return -1, &Missing{What: "device " + name, Err: err, Do: "another process, maybe another vrouter, has it: stop that one, or choose another --tun"}
	}
	return fd, nil
}

// isPair reports whether the device is an end of a pair that a vRouter has made.
func isPair(links *netlink.Handle, link netlink.Link) bool {
	if link.Type() != "veth" {
		return false
	}
	twin, err := links.LinkByName(twinName(link.Attrs().Name))
	return err == nil && twin.Type() == "veth" && twin.Attrs().ParentIndex == link.Attrs().Index
}

// removePair removes the device if it is a pair that a vRouter has left: the device is to be of another kind. The caller
// holds the device, and so do the others that remove one.
func removePair(name string) error {
	links, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer links.Close()
	link, err := links.LinkByName(name)
	if err != nil || !isPair(links, link) {
		return nil // whatever it is, opening the device will tell
	}
	if err := links.LinkDel(link); err != nil {
		return explainRemoval(name, err)
	}
	return nil
}

// explainRemoval is for a pair that cannot be removed.
func explainRemoval(name string, err error) error {
	return explainSocket("removal of the veth device "+name+" of an earlier vrouter", err)
}

// removeTUN removes the TUN device that a vRouter has left, which no process has open.
func removeTUN(name string) error {
	t := &TUN{}
	fd, err := t.openOffload(name)
	if errors.Is(err, unix.EINVAL) {
		t.multi = true
		fd, err = t.openOffload(name)
	}
	if err != nil {
		return err
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 0); err != nil {
		return errors.Join(fmt.Errorf("remove TUN device %s: %w", name, err), unix.Close(fd))
	}
	return unix.Close(fd) // with the last descriptor the device goes
}

// ensurePair returns both ends of the pair, the kernel's and ours, and makes it if it is not there, or has fewer queues
// than are wanted.
func (v *Veth) ensurePair() (host, twin netlink.Link, err error) {
	links, name, queues := v.links, v.name, v.pairQueues()
	host, err = links.LinkByName(name)
	if err == nil && isPair(links, host) && receiveQueues(v.fd, twinName(name)) < queues {
		if err := links.LinkDel(host); err != nil {
			return nil, nil, explainRemoval(name, err)
		}
		host, err = links.LinkByName(name)
	}
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.NumTxQueues, attrs.NumRxQueues = name, queues, queues
		err = links.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: twinName(name)})
		if err != nil {
			return nil, nil, explainVeth(name, err)
		}
		host, err = links.LinkByName(name)
	}
	if err != nil {
		return nil, nil, err
	}
	if !isPair(links, host) {
		return nil, nil, &Missing{What: "veth device " + name, Err: unix.EEXIST,
			Do: "an interface of that name and another kind is there: remove it, or choose another --tun"}
	}
	twin, err = links.LinkByName(twinName(name))
	return host, twin, err
}

func explainVeth(name string, err error) error {
	what := "veth device " + name
	switch {
	case errors.Is(err, unix.EPERM):
		return &Missing{What: what, Err: unix.EPERM, Do: needPrivilege}
	case errors.Is(err, unix.EOPNOTSUPP):
		return &Missing{What: what, Err: unix.EOPNOTSUPP, Do: "load the driver (modprobe veth), or choose --attach tun"}
	case errors.Is(err, unix.EEXIST):
		return &Missing{What: what, Err: unix.EEXIST, Do: "an interface " + twinName(name) + " is there: remove it, or choose another --tun"}
	}
	return fmt.Errorf("%s: %w", what, err)
}
