package ctl

import (
	"encoding/binary"
	"io"
	"time"

	"margay/internal/version"
)

// pcapng writes the file format of that name (draft-ietf-opsawg-pcapng), little-endian: a section, an interface for each port
// as it appears, packets with comments, and at the end what was lost. It is our own because the libraries at hand write no
// comments on packets.
type pcapng struct {
	w          io.Writer
	interfaces map[string]uint32
	buf        []byte
	whole      int64 // bytes of complete blocks
	failed     error // of a write: behind them may be a part of one, and nothing is written any more
}

// The blocks and options that are written.
const (
	blockSection    = 0x0a0d0d0a
	blockInterface  = 1
	blockStatistics = 5
	blockPacket     = 6

	optionEnd        = 0
	optionComment    = 1
	optionUserAppl   = 4 // of the section
	optionName       = 2 // of an interface
	optionResolution = 9 // of an interface
	optionDropped    = 5 // of the statistics: ISB_IFDROP
	linkTypeRaw      = 101
	nanoseconds      = 9
)

// newPcapng begins a file on w.
func newPcapng(w io.Writer) (*pcapng, error) {
	p := &pcapng{w: w, interfaces: map[string]uint32{}}
	body := binary.LittleEndian.AppendUint32(nil, 0x1a2b3c4d)
	body = append(body, 1, 0, 0, 0) // version 1.0
	body = binary.LittleEndian.AppendUint64(body, ^uint64(0))
	body = option(body, optionUserAppl, []byte("margayctl "+version.String()))
	return p, p.block(blockSection, option(body, optionEnd, nil))
}

// block writes one block: type, length, body, length.
func (p *pcapng) block(kind uint32, body []byte) error {
	if p.failed != nil {
		return p.failed
	}
	length := uint32(12 + len(body))
	p.buf = binary.LittleEndian.AppendUint32(p.buf[:0], kind)
	p.buf = binary.LittleEndian.AppendUint32(p.buf, length)
	p.buf = append(p.buf, body...)
	p.buf = binary.LittleEndian.AppendUint32(p.buf, length)
	if _, err := p.w.Write(p.buf); err != nil { // at once: a reader of a pipe sees whole blocks
		p.failed = err
		return err
	}
	p.whole += int64(length)
	return nil
}

// option appends an option, padded to 32 bits.
func option(b []byte, code uint16, value []byte) []byte {
	value = value[:min(len(value), 0xffff)]
	b = binary.LittleEndian.AppendUint16(b, code)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(value)))
	return pad(append(b, value...))
}

func pad(b []byte) []byte {
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

// id returns the number of an interface, and describes it in the file when it is new.
func (p *pcapng) id(name string) (uint32, error) {
	if id, ok := p.interfaces[name]; ok {
		return id, nil
	}
	id := uint32(len(p.interfaces))
	p.interfaces[name] = id
	body := binary.LittleEndian.AppendUint16(nil, linkTypeRaw)
	body = append(body, 0, 0, 0, 0, 0, 0) // reserved; no limit on the length
	body = option(body, optionName, []byte(name))
	body = option(body, optionResolution, []byte{nanoseconds})
	return id, p.block(blockInterface, option(body, optionEnd, nil))
}

// packet writes one packet, which begins with its IP header; length is its own, in bytes.
func (p *pcapng) packet(name string, at time.Time, b []byte, length int, comment string) error {
	id, err := p.id(name)
	if err != nil {
		return err
	}
	stamp := uint64(at.UnixNano())
	var body []byte
	for _, n := range []uint32{id, uint32(stamp >> 32), uint32(stamp), uint32(len(b)), uint32(length)} {
		body = binary.LittleEndian.AppendUint32(body, n)
	}
	body = pad(append(body, b...))
	if comment != "" {
		body = option(body, optionComment, []byte(comment))
		body = option(body, optionEnd, nil)
	}
	return p.block(blockPacket, body)
}

// lost writes how many packets an interface has lost, for want of room.
func (p *pcapng) lost(name string, at time.Time, n uint64) error {
	id, err := p.id(name)
	if err != nil {
		return err
	}
	stamp := uint64(at.UnixNano())
	body := binary.LittleEndian.AppendUint32(nil, id)
	body = binary.LittleEndian.AppendUint32(body, uint32(stamp>>32))
	body = binary.LittleEndian.AppendUint32(body, uint32(stamp))
	body = option(body, optionDropped, binary.LittleEndian.AppendUint64(nil, n))
	return p.block(blockStatistics, option(body, optionEnd, nil))
}
