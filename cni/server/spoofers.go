package server

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Who sends from an address that is not its own: a set that the kernel fills as it drops, and packets that may pass never see.

const (
	fwSpoofers = "spoofers"
	// spoofersKept bounds what one pod that tries many addresses makes the kernel hold; what finds no room is counted in the sum alone.
	spoofersKept = 512
	spoofersFor  = time.Hour // after the last packet
)

// Spoofed counts the IPv4 packets between two addresses that an interface was not allowed to send.
type Spoofed struct {
	Iface               string
	Source, Destination netip.Addr
	Packets, Bytes      uint64
}

func (f *firewall) spoofersSet() *nftables.Set {
	return &nftables.Set{Table: f.table, Name: fwSpoofers, Dynamic: true, HasTimeout: true, Timeout: spoofersFor, Size: spoofersKept,
		KeyType: nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeIPAddr, nftables.TypeIPAddr)}
}

// noteSpoofer is the rest of a rule that counts the packet by who sends it, and ends where there is no room. The addresses lie side
// by side in the key, four bytes each: the second one in the second quarter of register 2.
func (f *firewall) noteSpoofer() []expr.Any {
	const register2b = unix.NFT_REG32_05
	four := f.families[0]
	return []expr.Any{loadMeta(expr.MetaKeyIIFNAME), loadAddr(four.source, four.size, 2), loadAddr(four.dest, four.size, register2b),
		&expr.Dynset{SrcRegKey: 1, SetName: fwSpoofers, SetID: f.spoofers.ID, Operation: unix.NFT_DYNSET_OP_UPDATE, Exprs: []expr.Any{&expr.Counter{}}}}
}

// Spoofers returns the IPv4 packets that the anti-spoofing rules have dropped, by who sent them, in no order: of those who have in the
// last hour, as long as there was room. Counters has them all.
func (s *Server) Spoofers() ([]Spoofed, error) {
	f := s.fw
	f.mu.Lock()
	defer f.mu.Unlock()
	elements, err := f.conn.GetSetElements(f.spoofers)
	if err != nil {
		return nil, fmt.Errorf("nftables: read who spoofs: %w", err)
	}
	var out []Spoofed
	for _, e := range elements {
		if len(e.Key) != ifNameSize+8 || e.Counter == nil {
			continue // no such element is ours
		}
		out = append(out, Spoofed{Iface: strings.TrimRight(string(e.Key[:ifNameSize]), "\x00"), Source: netip.AddrFrom4([4]byte(e.Key[ifNameSize:])),
			Destination: netip.AddrFrom4([4]byte(e.Key[ifNameSize+4:])), Packets: e.Counter.Packets, Bytes: e.Counter.Bytes})
	}
	return out, nil
}
