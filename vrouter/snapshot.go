package vrouter

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net/netip"

	"margay/vrouter/fib"
)

// Saved is what outlives the process.
type Saved struct {
	Complete bool    // a synchronisation had been completed: see Status.Restored
	Config   *Config // nil: not configured
	Nodes    []netip.Addr
	Pods     []Pod
	Routes   []Route
}

// The file: magic (the last byte but one is the version), length and CRC-32 (IEEE) of the head, both big-endian, the
// head as JSON, then the routes as fib.Encode writes them.
const (
	savedMagic   = "MGVR\x01\n"
	savedHeadMax = 16 << 20 // bytes; a million nodes fit
)

// savedHead is Saved without the routes.
type savedHead struct {
	Complete bool         `json:"complete"`
	Config   *savedConfig `json:"config,omitempty"`
	Nodes    []netip.Addr `json:"nodes"`
	Pods     []savedPod   `json:"pods,omitempty"`
}

type savedPod struct {
	Address   netip.Addr `json:"address"`
	Interface string     `json:"interface"`
}

type savedConfig struct {
	NodeAddress   netip.Addr `json:"nodeAddress"`
	Underlay      string     `json:"underlay"`
	MTU           int        `json:"mtu"`
	TunnelAddress netip.Addr `json:"tunnelAddress"`
}

// EncodeSaved writes s to w.
func EncodeSaved(w io.Writer, s Saved) error {
	h := savedHead{Complete: s.Complete, Config: (*savedConfig)(s.Config), Nodes: s.Nodes}
	for _, p := range s.Pods {
		h.Pods = append(h.Pods, savedPod(p))
	}
	head, err := json.Marshal(h)
	if err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	prefix := []byte(savedMagic)
	prefix = binary.BigEndian.AppendUint32(prefix, uint32(len(head)))
	prefix = binary.BigEndian.AppendUint32(prefix, crc32.ChecksumIEEE(head))
	if _, err := w.Write(append(prefix, head...)); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	return fib.Encode(w, s.Routes)
}

// errNotSnapshot is the error for a file of another kind or of a version this release does not know.
var errNotSnapshot = errors.New("snapshot: expected a file written by this release of vrouter")

// DecodeSaved reads what EncodeSaved wrote. Anything else is an error, never a panic and never half a state.
func DecodeSaved(r io.Reader) (Saved, error) {
	var prefix [len(savedMagic) + 8]byte
	if _, err := io.ReadFull(r, prefix[:]); err != nil {
		return Saved{}, fmt.Errorf("%w: %w", errNotSnapshot, err)
	}
	if string(prefix[:len(savedMagic)]) != savedMagic {
		return Saved{}, errNotSnapshot
	}
	length := binary.BigEndian.Uint32(prefix[len(savedMagic):])
	sum := binary.BigEndian.Uint32(prefix[len(savedMagic)+4:])
	if length > savedHeadMax {
		return Saved{}, fmt.Errorf("snapshot: head of %d bytes: expected at most %d", length, savedHeadMax)
	}
	// Not allocated by what the file claims, but by what it holds.
	var head bytes.Buffer
	if _, err := io.CopyN(&head, r, int64(length)); err != nil {
		return Saved{}, fmt.Errorf("snapshot: head: %w", err)
	}
	if got := crc32.ChecksumIEEE(head.Bytes()); got != sum {
		return Saved{}, fmt.Errorf("snapshot: head: checksum %08x: expected %08x", got, sum)
	}
	var h savedHead
	if err := json.Unmarshal(head.Bytes(), &h); err != nil {
		return Saved{}, fmt.Errorf("snapshot: head: %w", err)
	}
	routes, err := fib.Decode(r)
	if err != nil {
		return Saved{}, fmt.Errorf("snapshot: routes: %w", err)
	}
	saved := Saved{Complete: h.Complete, Config: (*Config)(h.Config), Nodes: h.Nodes, Routes: routes}
	for _, p := range h.Pods {
		saved.Pods = append(saved.Pods, Pod(p))
	}
	return saved, nil
}
