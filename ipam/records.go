package ipam

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"margay/datastore"
)

const (
	root        = "/calico/ipam/v2/"
	hostRoot    = root + "host/"
	handleRoot  = root + "handle/"
	configKey   = root + "config"
	blockRootV4 = root + "assignment/ipv4/block/"
	blockRootV6 = root + "assignment/ipv6/block/"
)

// States of an affinity.
const (
	statePending   = "pending"   // being claimed: counts as none
	stateConfirmed = "confirmed" // the node's
)

// HandlePrefix is the key prefix of all handles.
const HandlePrefix = handleRoot

// AffinityPrefix is the key prefix of a node's IPv4 block affinities: what to watch for ConfirmedBlocks to change.
func AffinityPrefix(node string) string { return AffinityRoot(node) + "ipv4/block/" }

// AffinityRoot is the key prefix of a node's block affinities, IPv4 and IPv6.
func AffinityRoot(node string) string { return hostRoot + node + "/" }

// blockRoot is the key prefix of all blocks of one family, 4 or 6.
func blockRoot(family int) string {
	if family == 6 {
		return blockRootV6
	}
	return blockRootV4
}

// keyCIDR writes a prefix as keys do: "10.244.40.128-26", "fd00::40-122".
func keyCIDR(p netip.Prefix) string { return strings.Replace(p.String(), "/", "-", 1) }

// parseKeyCIDR reads a prefix as keys write it.
func parseKeyCIDR(text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(strings.Replace(text, "-", "/", 1))
	if err != nil || p != p.Masked() || keyCIDR(p) != text {
		return netip.Prefix{}, fmt.Errorf("key %q: expected a masked prefix such as 10.244.40.128-26 or fd00::40-122", text)
	}
	return p, nil
}

func blockKey(p netip.Prefix) string { return blockRoot(familyOf(p)) + keyCIDR(p) }

func affinityKey(node string, p netip.Prefix) string {
	return fmt.Sprintf("%sipv%d/block/%s", AffinityRoot(node), familyOf(p), keyCIDR(p))
}

func familyOf(p netip.Prefix) int {
	if p.Addr().Is6() {
		return 6
	}
	return 4
}

func handleKey(handle string) string { return handleRoot + handle }

// affinity is the value of an affinity key.
type affinity struct {
	state   string
	deleted bool
	extra   map[string]json.RawMessage
}

type wireAffinity struct {
	State   string `json:"state"`
	Deleted bool   `json:"deleted"`
}

func decodeAffinity(raw []byte) (affinity, error) {
	var w wireAffinity
	if err := json.Unmarshal(raw, &w); err != nil {
		return affinity{}, fmt.Errorf("expected an affinity: %w", datastore.JSONError(err))
	}
	extra, err := unknown(raw, "state", "deleted")
	return affinity{state: w.State, deleted: w.Deleted, extra: extra}, err
}

func (a affinity) encode() ([]byte, error) {
	return withUnknown(wireAffinity{State: a.state, Deleted: a.deleted}, a.extra)
}

// handle is the value of a handle key: how many addresses it holds in which block.
type handle struct {
	blocks  map[netip.Prefix]int
	deleted bool
	extra   map[string]json.RawMessage
}

type wireHandle struct {
	Block   map[string]int `json:"block"`
	Deleted bool           `json:"deleted"`
}

func decodeHandle(raw []byte) (handle, error) {
	var w wireHandle
	if err := json.Unmarshal(raw, &w); err != nil {
		return handle{}, fmt.Errorf("expected a handle: %w", datastore.JSONError(err))
	}
	h := handle{blocks: make(map[netip.Prefix]int, len(w.Block)), deleted: w.Deleted}
	for text, n := range w.Block {
		p, err := netip.ParsePrefix(text)
		if err != nil || p != p.Masked() || n < 0 {
			return handle{}, fmt.Errorf("block %q: expected a masked prefix and a count, got %d", text, n)
		}
		if n > 0 {
			h.blocks[p] = n
		}
	}
	var err error
	h.extra, err = unknown(raw, "block", "deleted")
	return h, err
}

func (h handle) encode() ([]byte, error) {
	w := wireHandle{Block: make(map[string]int, len(h.blocks)), Deleted: h.deleted}
	for p, n := range h.blocks {
		w.Block[p.String()] = n
	}
	return withUnknown(w, h.extra)
}

// validateHandle keeps a handle from reaching into other keys.
func validateHandle(h string) error {
	if h == "" || len(h) > 512 {
		return fmt.Errorf("handle %q: expected 1 to 512 characters", h)
	}
	for _, r := range h {
		if r == '/' || r <= ' ' || r == 0x7f {
			return fmt.Errorf("handle %q: expected neither '/' nor blanks nor control characters", h)
		}
	}
	return nil
}

// contended says that a write lost against another, and that starting over may help.
func contended(err error) bool {
	return errors.Is(err, datastore.ErrConflict) || errors.Is(err, datastore.ErrExists) || errors.Is(err, datastore.ErrNotFound)
}
