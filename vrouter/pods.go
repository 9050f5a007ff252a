package vrouter

import (
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
	"strings"
)

// Interface tells the ways into and out of a SwitchPort apart.
type Interface uint32

// The interfaces. HostInterface is the zero value: what nobody has claimed is the kernel's.
const (
	HostInterface      Interface = iota // vr0: the node's kernel
	UnderlayInterface                   // the other nodes
	FirstPodInterface                   // the pods have the numbers from here on
	noInterface        = HostInterface
	interfaceNameBytes = 15
)

// Pod is a pod of this node: its address, and the host's side of its interface, which the vRouter may take over.
type Pod struct {
	Address   netip.Addr
	Interface string
}

// Validate returns an error that names the first field that is wrong, and what was expected.
func (p Pod) Validate() error {
	a := p.Address
	if !a.IsValid() || a.Zone() != "" || a.Is4In6() || a.IsUnspecified() || a.IsMulticast() {
		return fmt.Errorf("pod: address %q: expected a unicast address without a zone", a)
	}
	if !validInterfaceName(p.Interface) {
		return fmt.Errorf("pod %s: interface %q: expected an interface name of 1 to %d characters", a, p.Interface, interfaceNameBytes)
	}
	return nil
}

func validInterfaceName(name string) bool {
	return len(name) > 0 && len(name) <= interfaceNameBytes && !strings.ContainsAny(name, "/ \t\n\x00")
}

// Pods is the table of the pods whose interfaces a SwitchPort has: from an IPv4 address to the interface and back. It is
// immutable.
type Pods struct {
	addresses []uint32  // of interface FirstPodInterface and on; 0: none
	mtus      []int     // of the same interfaces, in bytes; nil: none is narrower than Config.MTU
	narrowest int       // the least of mtus
	cells     []podCell // a hash table, open addressing; its length is a power of two and at least twice what it holds
	shift     uint8
}

type podCell struct {
	address uint32
	at      Interface // noInterface: the cell is free
}

// hashMultiplier is 2^32 divided by the golden ratio: multiplying by it spreads neighbouring addresses (Knuth, 6.4).
const hashMultiplier = 0x9e3779b1

// NewPods returns the table in which the pod with the IPv4 address addresses[i] has the interface FirstPodInterface+i, with
// the MTU mtus[i] in bytes. A number that no pod has carries the zero Addr. Where mtus is nil none is less than Config.MTU.
func NewPods(addresses []netip.Addr, mtus []int) *Pods {
	p := &Pods{addresses: make([]uint32, len(addresses)), mtus: mtus, narrowest: math.MaxInt, shift: 31}
	for size := 2; size < 2*len(addresses); size *= 2 {
		p.shift--
	}
	p.cells = make([]podCell, 1<<(32-p.shift))
	for i, a := range addresses {
		if !a.Is4() {
			continue
		}
		b := a.As4()
		n := binary.BigEndian.Uint32(b[:])
		p.addresses[i] = n
		if mtus != nil {
			p.narrowest = min(p.narrowest, mtus[i])
		}
		at := n * hashMultiplier >> p.shift
		for p.cells[at].at != noInterface {
			at = (at + 1) & uint32(len(p.cells)-1)
		}
		p.cells[at] = podCell{n, FirstPodInterface + Interface(i)}
	}
	return p
}

// find returns the interface of the pod that has the address, or noInterface.
func (p *Pods) find(address uint32) Interface {
	for at := address * hashMultiplier >> p.shift; ; at = (at + 1) & uint32(len(p.cells)-1) {
		c := &p.cells[at]
		if c.address == address || c.at == noInterface {
			return c.at
		}
	}
}

// carries reports whether a pod's interface carries a packet of so many bytes.
func (p *Pods) carries(at Interface, length int) bool {
	return length <= p.narrowest || length <= p.mtus[at-FirstPodInterface]
}

// address returns the address of the pod at an interface, 0 where there is none.
func (p *Pods) address(at Interface) uint32 {
	if i := int(at) - int(FirstPodInterface); i >= 0 && i < len(p.addresses) {
		return p.addresses[i]
	}
	return 0
}
