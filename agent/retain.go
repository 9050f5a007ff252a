package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
)

// retainer remembers which pools were in force, because pods outlive them: a pod whose pool is deleted, or made again
// smaller, keeps its address, and without the pool's routes it would go on in clear. What it remembers is on disk, so that
// a pool that goes while no agent runs is missed, too.
type retainer struct {
	file     string // empty: nothing is kept
	log      *slog.Logger
	inForce  map[netip.Prefix]Pool // at the last look, retained ones included
	retained map[netip.Prefix]bool // which of them are in force only because pods live in them
}

// newRetainer reads what the agent before has written. A file that cannot be used is said and forgotten: it is only needed
// for pools that are gone.
func newRetainer(file string, log *slog.Logger) *retainer {
	r := &retainer{file: file, log: log, inForce: map[netip.Prefix]Pool{}, retained: map[netip.Prefix]bool{}}
	raw, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return r
	}
	var pools []Pool
	if err == nil {
		pools, err = decodePools(raw)
	}
	if err != nil {
		log.Warn("which pools were in force before is not known: pods whose pool was deleted meanwhile may lose their routes", "file", file, "err", err)
	}
	for _, p := range pools {
		r.inForce[p.CIDR] = p
	}
	return r
}

// decodePools reads the file's content.
func decodePools(raw []byte) ([]Pool, error) {
	var pools []Pool
	if err := json.Unmarshal(raw, &pools); err != nil {
		return nil, err
	}
	for _, p := range pools {
		if !p.CIDR.IsValid() || p.CIDR != p.CIDR.Masked() || p.CIDR.Addr().Is4In6() {
			return nil, fmt.Errorf("pool %q: CIDR %q: expected a prefix without host bits", p.Name, p.CIDR)
		}
	}
	return pools, nil
}

// look returns the pools to route by, the most specific first: those that there are, and of those that were in force what
// no pool covers any more and a pod of this node still lives in. Blind, nobody knows that a pool is gone: it is retained
// without a word.
func (r *retainer) look(pools []Pool, pods []netip.Addr, blind bool) []Pool {
	now := make(map[netip.Prefix]Pool, len(pools))
	for _, p := range pools {
		now[p.CIDR] = p
	}
	kept := map[netip.Prefix]bool{}
	for cidr, p := range r.inForce {
		for _, part := range without(cidr, pools) {
			if !slices.ContainsFunc(pods, part.Contains) {
				continue
			}
			if !blind && !r.retained[part] {
				r.log.Warn("IPPool was deleted and pods still live in it; its routes stay until they are gone", "name", p.Name, "cidr", part)
			}
			// One that nobody is told of is news when the datastore can be read again.
			kept[part] = !blind || r.retained[part]
			p.CIDR = part
			now[part] = p
		}
	}
	r.retained = kept
	if !maps.Equal(now, r.inForce) {
		r.inForce = now
		if err := r.save(); err != nil {
			r.log.Warn("remembering which pools are in force", "err", err)
		}
	}
	return slices.SortedFunc(maps.Values(now), bySpecificity)
}

// save writes the file whole or not at all.
func (r *retainer) save() error {
	if r.file == "" {
		return nil
	}
	raw, err := json.Marshal(slices.SortedFunc(maps.Values(r.inForce), bySpecificity))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(r.file), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(r.file+".new", raw, 0o600); err != nil {
		return err
	}
	return os.Rename(r.file+".new", r.file)
}

// without is what is left of a prefix where no pool is.
func without(p netip.Prefix, pools []Pool) []netip.Prefix {
	inside := false
	for _, o := range pools {
		if o.CIDR.Overlaps(p) {
			if o.CIDR.Bits() <= p.Bits() {
				return nil
			}
			inside = true
		}
	}
	if !inside {
		return []netip.Prefix{p}
	}
	low, high := halves(p)
	return append(without(low, pools), without(high, pools)...)
}

// halves are the two prefixes that are one bit longer than p, which is no single address.
func halves(p netip.Prefix) (low, high netip.Prefix) {
	bytes := p.Addr().AsSlice()
	bytes[p.Bits()/8] |= 0x80 >> (p.Bits() % 8)
	upper, _ := netip.AddrFromSlice(bytes) // of the length that it had
	return netip.PrefixFrom(p.Addr(), p.Bits()+1), netip.PrefixFrom(upper, p.Bits()+1)
}
