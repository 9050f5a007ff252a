package agent

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"margay/agent/api"
	"margay/internal/dump"
	"margay/vrouter/packet"
)

// A probe is a real packet, sent out of a pod as the pod could send it, and watched for on every node of its way: on all
// interfaces, and inside the pods at both ends. Whoever may trace may probe; a probe's source is always a pod of this node, or
// the node itself.

const (
	watchTime  = 10 * time.Second // of one watch, at most
	maxWatches = 8                // at a time
)

// handleProbe adds what sends and watches.
func (a *Agent) handleProbe(mux *http.ServeMux) {
	mux.HandleFunc("POST "+api.ProbePath, func(w http.ResponseWriter, r *http.Request) {
		var req api.ProbeRequest
		if !readRequest(w, r, "probe", &req) {
			return
		}
		pkt, err := probePacket(req.Packet)
		if err == nil && !a.isOpen() {
			err = errors.New("the agent is still starting")
		}
		switch {
		case err != nil:
		case req.Watch:
			err = a.watchProbe(r.Context(), w, pkt, req.Inside)
		default:
			var refused error
			if refused, err = a.sendProbe(pkt, req.Entry); err == nil {
				reply := api.ProbeReply{}
				if refused != nil {
					reply.Refused = refused.Error()
				}
				a.reply(w, reply)
			}
		}
		if err != nil {
			http.Error(w, "probe: "+err.Error(), http.StatusBadRequest)
		}
	})
}

// probePacket checks what is to be sent, or watched for.
func probePacket(b []byte) (packet.IPv4, error) {
	p, fault := packet.ParseIPv4(b)
	switch {
	case fault != packet.FaultNone:
		return nil, fmt.Errorf("packet: %s: expected an IPv4 packet", fault)
	case p.ID() == 0 || p.IsFragment():
		return nil, errors.New("packet: expected a whole one, with an identification that marks it")
	case p.Dst().IsMulticast() || p.Dst() == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return nil, fmt.Errorf("packet: destination %s: expected one host", p.Dst())
	}
	return p, nil
}

// sendProbe sends a packet out of the pod that has its source, or from this node. refused is what the kernel there has to say
// against it; the error says that nothing was tried.
func (a *Agent) sendProbe(p packet.IPv4, entry api.Entry) (refused, err error) {
	send := func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return needsRaw(err)
		}
		defer unix.Close(fd)
		refused = sendRaw(fd, p)
		return nil
	}
	switch entry {
	case api.EntryHost:
		if src := p.Src(); !src.IsUnspecified() && !a.kernel.has(src) {
			return nil, fmt.Errorf("packet: source %s is not this node's", src)
		}
		err = send()
	case api.EntryPod:
		device := a.pods.link(p.Src())
		if device == "" {
			return nil, fmt.Errorf("packet: no pod of this node has the source %s", p.Src())
		}
		err = a.cni.EnterPod(device, func(int) error { return send() })
	default:
		err = fmt.Errorf("entry %q: expected pod or host", entry)
	}
	return refused, err
}

// sendRaw sends a packet by a raw socket of the calling thread's network namespace, in fragments where it does not fit and may
// be cut.
func sendRaw(fd int, p packet.IPv4) error {
	send := func(b []byte) error { return unix.Sendto(fd, b, 0, &unix.SockaddrInet4{Addr: p.Dst().As4()}) }
	err := send(p)
	if !errors.Is(err, unix.EMSGSIZE) || p.DF() {
		return err
	}
	// A raw socket does not cut.
	routes, err := netlink.RouteGet(p.Dst().AsSlice())
	if err != nil || len(routes) == 0 {
		return fmt.Errorf("route to %s: %w", p.Dst(), err)
	}
	link, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return err
	}
	var f packet.Fragmenter
	if fault := f.Start(p, link.Attrs().MTU); fault != packet.FaultNone {
		return fmt.Errorf("cut it to %d bytes: %s", link.Attrs().MTU, fault)
	}
	for b := make([]byte, len(p)); ; {
		n := f.Next(b)
		if n == 0 {
			return nil
		}
		if err := send(b[:n]); err != nil {
			return err
		}
	}
}

func needsRaw(err error) error {
	if errors.Is(err, unix.EPERM) {
		return errors.New("margay-agent needs the capability NET_RAW to send and see packets")
	}
	return err
}

// turns counts what is under way of something that may be done by so many at a time.
type turns struct{ taken atomic.Int32 }

// begin takes a turn; false: most are taken.
func (t *turns) begin(most int32) bool {
	if t.taken.Add(1) > most {
		t.end()
		return false
	}
	return true
}

func (t *turns) end() { t.taken.Add(-1) }

// watcher gathers what several sockets see.
type watcher struct {
	ctx  context.Context
	of   packet.IPv4
	seen chan api.Sighting
	wg   sync.WaitGroup
}

// watchProbe tells, a line each, where a probe and what answers it are seen, until the caller has enough. The first line is
// empty: it watches. inside are addresses, of which those that pods of this node have are watched from inside, too.
func (a *Agent) watchProbe(ctx context.Context, out http.ResponseWriter, p packet.IPv4, inside []netip.Addr) error {
	if !a.watches.begin(maxWatches) {
		return fmt.Errorf("%d watches are under way: try again", maxWatches)
	}
	defer a.watches.end()
	ctx, cancel := context.WithTimeout(ctx, watchTime)
	defer cancel()
	w := &watcher{of: p, seen: make(chan api.Sighting, 64), ctx: ctx}
	defer w.wg.Wait()
	defer cancel()
	if err := w.open(""); err != nil {
		return err
	}
	for _, addr := range inside {
		if device := a.pods.link(addr); device != "" {
			if err := a.cni.EnterPod(device, func(int) error { return w.open(addr.String()) }); err != nil {
				return fmt.Errorf("inside the pod %s: %w", addr, err)
			}
		}
	}
	out.Header().Set("Content-Type", "application/x-ndjson")
	enc, flush := json.NewEncoder(out), http.NewResponseController(out)
	for s := (api.Sighting{}); ; {
		s.Node = a.cfg.Node
		if err := errors.Join(enc.Encode(s), flush.Flush()); err != nil {
			return nil // who asked has heard enough
		}
		select {
		case <-ctx.Done():
			return nil
		case s = <-w.seen:
		}
	}
}

// open watches the calling thread's network namespace.
func (w *watcher) open(pod string) error {
	links, err := dump.Links(dump.Here)
	if err != nil {
		return err
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0) // hears nothing until it is bound
	if err != nil {
		return needsRaw(err)
	}
	filter, err := probeFilter(w.of)
	if err == nil {
		err = errors.Join(unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000}),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: 3 << 8})) // ETH_P_ALL, in network order
	}
	if err != nil {
		return errors.Join(err, unix.Close(fd))
	}
	w.wg.Go(func() {
		defer unix.Close(fd)
		w.receive(fd, pod, names)
	})
	return nil
}

func (w *watcher) receive(fd int, pod string, names map[int]string) {
	for buf := make([]byte, packet.MaxTotalLen); w.ctx.Err() == nil; {
		n, from, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
				continue
			}
			return
		}
		s, ok := sight(buf[:n], w.of)
		at, isLink := from.(*unix.SockaddrLinklayer)
		if !ok || !isLink || at.Pkttype == unix.PACKET_OTHERHOST {
			continue
		}
		s.Pod, s.Interface, s.Time = pod, names[at.Ifindex], time.Now()
		s.Outgoing = at.Pkttype == unix.PACKET_OUTGOING
		select {
		case w.seen <- s:
		case <-w.ctx.Done():
		}
	}
}

const (
	headerLen = 20 // of IPv4 without options, which probes do not have, and of TCP's, bytes
	seqAt     = 4  // in TCP's header
	ackAt     = 8
)

// ports returns a probe's ports; zeros where there are none.
func ports(p packet.IPv4) (source, destination uint16) {
	if b := p.Payload(); len(b) >= 4 {
		return binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
	}
	return 0, 0
}

// acknowledges reports whether a TCP header answers a probe's: its SYN, and of its data all, some or none.
func acknowledges(b, probe []byte) bool {
	if len(b) < headerLen || len(probe) < headerLen {
		return false
	}
	ahead := binary.BigEndian.Uint32(b[ackAt:]) - binary.BigEndian.Uint32(probe[seqAt:])
	return ahead >= 1 && int64(ahead) <= int64(len(probe)-headerLen+1)
}

// sight says what a packet is to a probe: the probe itself, an answer to it, or an ICMP error about it; false for neither. Any
// of them may be in IP-in-IP.
func sight(b []byte, of packet.IPv4) (s api.Sighting, ok bool) {
	p, fault := packet.ParseIPv4(b)
	if fault == packet.FaultNone && p.Protocol() == packet.ProtocolIPIP && !(p.ID() == of.ID() && of.Protocol() == packet.ProtocolIPIP) {
		s.Outer = fmt.Sprintf("%s to %s", p.Src(), p.Dst())
		p, fault = packet.ParseIPv4(p.Payload())
	}
	if fault != packet.FaultNone {
		return s, false
	}
	s.Length = len(b)
	up := p.Payload()
	if p.ID() == of.ID() && p.Protocol() == of.Protocol() {
		s.What = api.SawProbe
		return s, p.FragOffset() == 0
	}
	if p.IsFragment() && p.FragOffset() != 0 || len(up) < 8 {
		return s, false
	}
	source, destination := ports(of)
	answers := binary.BigEndian.Uint16(up) == destination && binary.BigEndian.Uint16(up[2:]) == source
	switch {
	case p.Protocol() == unix.IPPROTO_ICMP && slices.Contains([]byte{3, 11, 12}, up[0]):
		if !quotes(up[8:], of) {
			return s, false
		}
		s.What, s.From, s.Type, s.Code = api.SawError, p.Src(), up[0], up[1]
		if up[0] == packet.ICMPUnreachable && up[1] == packet.CodeFragNeeded {
			s.MTU = int(binary.BigEndian.Uint16(up[6:]))
		}
		return s, true
	case p.Protocol() != of.Protocol():
		return s, false
	case p.Protocol() == unix.IPPROTO_ICMP:
		ok = up[0] == 0 && len(of.Payload()) >= 8 && slices.Equal(up[4:8], of.Payload()[4:8])
	case p.Protocol() == packet.ProtocolTCP:
		ok = answers && acknowledges(up, of.Payload())
	case p.Protocol() == packet.ProtocolUDP:
		ok = answers
	}
	s.What, s.From = api.SawAnswer, p.Src()
	return s, ok
}

// quotes reports whether an ICMP error's quotation begins with the probe, or with IP-in-IP that carries it.
func quotes(b []byte, of packet.IPv4) bool {
	for range 2 {
		if len(b) < headerLen || b[0]>>4 != 4 {
			return false
		}
		if binary.BigEndian.Uint16(b[4:]) == of.ID() && b[9] == of.Protocol() {
			return true
		}
		if b[9] != packet.ProtocolIPIP {
			return false
		}
		b = b[min(max(int(b[0]&0xf)<<2, headerLen), len(b)):]
	}
	return false
}

// probeFilter keeps other packets away from a watch: what it accepts sight looks at. It reads headers without options, the outer
// one and that within IP-in-IP.
func probeFilter(p packet.IPv4) ([]unix.SockFilter, error) {
	source, destination := ports(p)
	type test struct {
		offset uint32
		size   int
		is     uint32
	}
	var program []bpf.Instruction
	// accept takes a packet that passes all tests, and goes on behind itself for others.
	accept := func(tests ...test) {
		for i, t := range tests {
			left := 2*(len(tests)-i) - 1
			program = append(program, bpf.LoadAbsolute{Off: t.offset, Size: t.size}, bpf.JumpIf{Cond: bpf.JumpEqual, Val: t.is, SkipFalse: uint8(left)})
		}
		program = append(program, bpf.RetConstant{Val: packet.MaxTotalLen})
	}
	about := func(base uint32) {
		protocol := base + 9
		accept(test{base + 4, 2, uint32(p.ID())})
		accept(test{protocol, 1, unix.IPPROTO_ICMP})
		for _, p := range []uint32{packet.ProtocolTCP, packet.ProtocolUDP} {
			accept(test{protocol, 1, p}, test{base + headerLen, 2, uint32(destination)}, test{base + headerLen + 2, 2, uint32(source)})
		}
	}
	about(0)
	program = append(program, bpf.LoadAbsolute{Off: 9, Size: 1}, bpf.JumpIf{Cond: bpf.JumpEqual, Val: packet.ProtocolIPIP, SkipTrue: 1}, bpf.RetConstant{})
	about(headerLen)
	program = append(program, bpf.RetConstant{})
	raw, err := bpf.Assemble(program)
	if err != nil {
		return nil, fmt.Errorf("the filter of a watch: %w", err)
	}
	out := make([]unix.SockFilter, 0, len(raw))
	for _, r := range raw {
		out = append(out, unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K})
	}
	return out, nil
}
