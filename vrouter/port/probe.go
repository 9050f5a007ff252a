package port

import (
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Probe is one thing that the drivers need of the kernel, and whether it is there.
type Probe struct {
	Name string
	// Needed says that without it no vRouter starts; the others only make it faster.
	Needed bool
	For    string // what it is for
	Err    error  // nil: it is there; else usually a Missing
}

// ProbeAll opens, in the calling thread's network namespace, what the drivers open, and closes it again. It leaves nothing
// behind and disturbs no vRouter that runs.
func ProbeAll() []Probe {
	return []Probe{
		{"veth", true, "vr0 and the pods' interfaces", probeVeth()},
		{"TUN device", false, "--attach tun, tun-plain and direct", probeTUN((*TUN).openPlain)},
		{"TUN offloads", false, "superpackets that come whole from the pods (--attach tun)", probeTUN((*TUN).openOffload)},
		{"sockets", true, "sending and receiving IP-in-IP", probeUnderlay()},
		{"BPF at tc egress", false, "superpackets that leave whole for other nodes", probeRetag()},
		{"BPF for direct", false, "--attach direct", probeSteering(IOPacket)},
		{"BPF for tc", false, "--attach direct --io tc", probeSteering(IOTC)},
		{"AF_XDP", false, "--io xdp", probeXDP(XDPOptions{})},
	}
}

// probeTUN makes a device of a name of its own, which goes when it is closed.
func probeTUN(open func(*TUN, string) (int, error)) error {
	name := fmt.Sprintf("vrprobe%d", os.Getpid()%1e8)
	fd, err := open(&TUN{vr0: vr0{name: name}, vnet: vnetHeader}, name)
	if err != nil {
		return err
	}
	return errors.Join(unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 0), unix.Close(fd))
}

// probeVeth makes a pair of names of its own.
func probeVeth() error {
	name := fmt.Sprintf("vrprobe%d", os.Getpid()%1e8)
	pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: fmt.Sprintf("vrpeer%d", os.Getpid()%1e8)}
	if err := netlink.LinkAdd(pair); err != nil {
		return explainVeth(name, err)
	}
	return netlink.LinkDel(pair)
}

func probeUnderlay() error {
	u, err := OpenUnderlay()
	if err != nil {
		return err
	}
	return u.Close()
}

func probeRetag() error {
	r, err := newRetag()
	if err != nil {
		return err
	}
	return r.close()
}

func probeSteering(io string) error {
	s, err := newSteering(io)
	if err != nil {
		return err
	}
	return s.close()
}
