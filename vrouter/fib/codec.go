package fib

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net/netip"
)

// The format, all numbers big-endian:
//
//	magic    8 bytes  "margyfib"
//	version  uint16   1, or 2 if a route has several gateways: who knows only 1 reads all else
//	count    uint32   number of routes
//	length   uint32   bytes of the routes that follow
//	routes            each: kind (1), family 4 or 6 (1), prefix length (1), address (4 or 16),
//	                  and the gateway (4 or 16) where the kind has one; with several the highest bit of
//	                  kind is set, and the number of the others (1) and they (4 or 16 each) follow
//	crc      uint32   CRC-32 (IEEE) of all that precedes
const (
	codecMagic   = "margyfib"
	codecVersion = 1
	codecGroups  = 2 // the version with groups
	codecGroup   = 0x80
	headerLen    = len(codecMagic) + 2 + 4 + 4
	// minRecord is the shortest route: IPv4, no gateway.
	minRecord = 3 + 4
	// maxPayload bounds what a damaged length field can make Decode read: about 70 million IPv4 routes.
	maxPayload = 1 << 29
)

// ErrCorrupt is wrapped by Decode's errors about bytes that are no snapshot, a damaged one, or one of a version that
// this program does not know.
var ErrCorrupt = errors.New("corrupt FIB snapshot")

// Encode writes routes to w, versioned and checksummed, for Decode to read. It refuses a route that
// [Route.Validate] refuses, with its index, and then has written nothing.
func Encode(w io.Writer, routes []Route) error {
	buf := make([]byte, headerLen, headerLen+len(routes)*(minRecord+4)+4)
	version := uint16(codecVersion)
	for i, r := range routes {
		if err := r.Validate(); err != nil {
			return fmt.Errorf("encode FIB snapshot: routes[%d]: %w", i, err)
		}
		if r.NextHop.IsGroup() {
			version = codecGroups
		}
		buf = appendRoute(buf, r)
	}
	length := len(buf) - headerLen
	if length > maxPayload {
		return fmt.Errorf("encode FIB snapshot: %d routes: want at most %d bytes of them, have %d", len(routes), maxPayload, length)
	}
	f := buf[copy(buf, codecMagic):]
	binary.BigEndian.PutUint16(f, version)
	binary.BigEndian.PutUint32(f[2:], uint32(len(routes)))
	binary.BigEndian.PutUint32(f[6:], uint32(length))
	buf = binary.BigEndian.AppendUint32(buf, crc32.ChecksumIEEE(buf))
	if _, err := w.Write(buf); err != nil {
		return fmt.Errorf("encode FIB snapshot: %w", err)
	}
	return nil
}

func appendRoute(buf []byte, r Route) []byte {
	family := byte(6)
	if r.Prefix.Addr().Is4() {
		family = 4
	}
	kind := byte(r.NextHop.Kind)
	if r.NextHop.IsGroup() {
		kind |= codecGroup
	}
	buf = append(buf, kind, family, byte(r.Prefix.Bits()))
	buf = append(buf, r.Prefix.Addr().AsSlice()...)
	buf = append(buf, r.NextHop.Gateway.AsSlice()...) // nothing where there is no gateway
	if r.NextHop.IsGroup() {
		others := r.NextHop.Others.append(nil)
		buf = append(buf, byte(len(others)))
		for _, a := range others {
			buf = append(buf, a.AsSlice()...)
		}
	}
	return buf
}

// Decode reads what Encode wrote, and not a byte more, so that other sections may follow in the same file. The routes
// have the order in which they were written and are all valid. Bytes that are not a whole, undamaged snapshot give an
// error that wraps ErrCorrupt, and no routes; a reader's own error is wrapped as it is.
func Decode(r io.Reader) ([]Route, error) {
	head := make([]byte, headerLen)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, readError("header", err)
	}
	if string(head[:len(codecMagic)]) != codecMagic {
		return nil, fmt.Errorf("decode: %w: magic: %q: want %q", ErrCorrupt, head[:len(codecMagic)], codecMagic)
	}
	f := head[len(codecMagic):]
	version, count, length := binary.BigEndian.Uint16(f), binary.BigEndian.Uint32(f[2:]), binary.BigEndian.Uint32(f[6:])
	if version != codecVersion && version != codecGroups {
		return nil, fmt.Errorf("decode: %w: version: %d: want %d or %d", ErrCorrupt, version, codecVersion, codecGroups)
	}
	if length > maxPayload || uint64(count)*minRecord > uint64(length) {
		return nil, fmt.Errorf("decode: %w: length: %d bytes for %d routes: want %d to %d", ErrCorrupt, length, count, uint64(count)*minRecord, maxPayload)
	}
	// The buffer grows with what arrives, not with what the header claims.
	var body bytes.Buffer
	if _, err := io.CopyN(&body, r, int64(length)+4); err != nil {
		return nil, readError("routes", err)
	}
	payload, tail := body.Bytes()[:length], body.Bytes()[length:]
	sum := crc32.Update(crc32.ChecksumIEEE(head), crc32.IEEETable, payload)
	if got := binary.BigEndian.Uint32(tail); got != sum {
		return nil, fmt.Errorf("decode: %w: checksum: %08x: want %08x", ErrCorrupt, got, sum)
	}
	return decodeRoutes(payload, int(count), version)
}

func decodeRoutes(b []byte, count int, version uint16) ([]Route, error) {
	routes, groups := make([]Route, 0, count), false
	for i := range count {
		r, rest, err := decodeRoute(b)
		if err == nil {
			err = r.Validate()
		}
		if err != nil {
			return nil, fmt.Errorf("decode: %w: routes[%d]: %w", ErrCorrupt, i, err)
		}
		groups = groups || r.NextHop.IsGroup()
		routes, b = append(routes, r), rest
	}
	if groups != (version == codecGroups) {
		return nil, fmt.Errorf("decode: %w: routes: with several gateways: %v: want what version %d says", ErrCorrupt, groups, version)
	}
	if len(b) != 0 {
		return nil, fmt.Errorf("decode: %w: routes: %d bytes behind the last: want none", ErrCorrupt, len(b))
	}
	return routes, nil
}

// decodeRoute takes one route off b. Whether it makes sense is for Validate to say.
func decodeRoute(b []byte) (r Route, rest []byte, err error) {
	if len(b) < 3 {
		return r, nil, errors.New("cut short: want kind, family and length")
	}
	kind, isGroup := Kind(b[0]&^codecGroup), b[0]&codecGroup != 0
	family, bits := b[1], int(b[2])
	b = b[3:]
	size := 4
	switch family {
	case 4:
	case 6:
		size = 16
	default:
		return r, nil, fmt.Errorf("family: %d: want 4 or 6", family)
	}
	need := size
	if kind == KindTunnel || kind == KindDirect {
		need += size
	} else if isGroup {
		return r, nil, fmt.Errorf("kind: %v: want tunnel or direct with several gateways", kind)
	}
	if len(b) < need {
		return r, nil, fmt.Errorf("cut short: %d bytes: want %d of addresses", len(b), need)
	}
	addr, _ := netip.AddrFromSlice(b[:size])
	r = Route{netip.PrefixFrom(addr, bits), NextHop{Kind: kind}}
	if need > size {
		r.NextHop.Gateway, _ = netip.AddrFromSlice(b[size:need])
	}
	b = b[need:]
	if isGroup {
		r.NextHop.Others, b, err = decodeOthers(b, size)
	}
	return r, b, err
}

// decodeOthers takes the gateways of a group but the first off b, size bytes each.
func decodeOthers(b []byte, size int) (g Gateways, rest []byte, err error) {
	if len(b) == 0 || b[0] == 0 || len(b) < 1+int(b[0])*size {
		return g, nil, errors.New("cut short: want the number of the other gateways, from 1, and they")
	}
	others := make([]netip.Addr, b[0])
	b = b[1:]
	for i := range others {
		others[i], _ = netip.AddrFromSlice(b[:size])
		b = b[size:]
	}
	return gatewaysOf(others), b, nil
}

// readError tells an input that ends too early, which is corruption, from a reader that failed.
func readError(what string, err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("decode: %w: %s: cut short", ErrCorrupt, what)
	}
	return fmt.Errorf("decode FIB snapshot: %s: %w", what, err)
}
