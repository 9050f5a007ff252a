package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"margay/datastore"
	"margay/ipam/audit"
)

// model is IPAM as one would naively want it: who holds which addresses.
type model struct {
	held   map[string][]netip.Addr
	by     map[netip.Addr]string
	nodeOf map[string]string // whose pod a handle is
	strict bool
}

func (m *model) forget(handle string) {
	for _, a := range m.held[handle] {
		delete(m.by, a)
	}
	delete(m.held, handle)
	delete(m.nodeOf, handle)
}

// machine drives allocators of three nodes and the model side by side.
type machine struct {
	model
	store  *datastore.Store
	allocs map[string]*Allocator
	four   netip.Prefix
	six    netip.Prefix
}

func (m *machine) alloc(t *rapid.T) (string, *Allocator) {
	node := rapid.SampledFrom([]string{"n1", "n2", "n3"}).Draw(t, "node")
	return node, m.allocs[node]
}

func (m *machine) handle(t *rapid.T) string {
	return fmt.Sprint("net.", rapid.IntRange(0, 19).Draw(t, "handle"))
}

func (m *machine) free(p netip.Prefix) (n int) {
	for a := p.Addr(); p.Contains(a); a = a.Next() {
		if m.by[a] == "" {
			n++
		}
	}
	return n
}

func (m *machine) assign(t *rapid.T) {
	node, a := m.alloc(t)
	req := Request{Handle: m.handle(t), Attrs: map[string]string{"pod": "x"}}
	wants := rapid.SampledFrom([]string{"4", "6", "46"}).Draw(t, "families")
	var pools []netip.Prefix
	for _, w := range wants {
		if w == '4' {
			req.IPv4.Want, pools = Required, append(pools, m.four)
		} else {
			req.IPv6.Want, pools = Required, append(pools, m.six)
		}
	}
	got, err := a.AssignAll(t.Context(), req)
	room := !slices.ContainsFunc(pools, func(p netip.Prefix) bool { return m.free(p) == 0 })
	switch {
	case len(m.held[req.Handle]) > 0:
		if !errors.Is(err, ErrHandleInUse) {
			t.Fatalf("%s holds %v and got %v, %v", req.Handle, m.held[req.Handle], got, err)
		}
	case errors.Is(err, ErrNoAddress):
		// Under strict affinity what is free may be in others' blocks.
		if room && !m.strict {
			t.Fatalf("%s got none, and there are free ones: %v", node, err)
		}
	case err != nil:
		t.Fatal(err)
	default:
		if len(got) != len(pools) {
			t.Fatalf("asked of %v: %v", pools, got)
		}
		for i, g := range got {
			m.take(t, node, req.Handle, g.Addr, pools[i])
		}
	}
}

func (m *machine) take(t *rapid.T, node, handle string, a netip.Addr, pool netip.Prefix) {
	if other := m.by[a]; other != "" || !pool.Contains(a) {
		t.Fatalf("%s was given to %s, and %q has it; the pool is %s", a, handle, other, pool)
	}
	m.by[a], m.nodeOf[handle] = handle, node
	m.held[handle] = append(m.held[handle], a)
}

func (m *machine) assignFixed(t *rapid.T) {
	node, a := m.alloc(t)
	handle := m.handle(t)
	want := advance(m.four.Addr(), rapid.Uint64Range(0, 15).Draw(t, "ordinal"), 0)
	got, err := a.Assign(t.Context(), Request{Handle: handle, IPv4: Ask{IP: want}})
	switch {
	case len(m.held[handle]) > 0:
		if !errors.Is(err, ErrHandleInUse) {
			t.Fatalf("%s holds %v and got %v, %v", handle, m.held[handle], got, err)
		}
	case m.by[want] != "":
		if !errors.Is(err, ErrAddressInUse) {
			t.Fatalf("%s, which %s has: %v, %v", want, m.by[want], got, err)
		}
	case errors.Is(err, ErrAddressInUse) && m.strict: // in another's block
	case err != nil || got.Addr != want:
		t.Fatalf("%s: %v, %v", want, got, err)
	default:
		m.take(t, node, handle, want, m.four)
	}
}

func (m *machine) releaseHandle(t *rapid.T) {
	_, a := m.alloc(t) // anybody may
	handle := m.handle(t)
	freed, err := a.ReleaseHandle(t.Context(), handle)
	if err != nil || !sameSet(freed, m.held[handle]) {
		t.Fatalf("%s holds %v: released %v, %v", handle, m.held[handle], freed, err)
	}
	m.model.forget(handle)
}

func sameSet(a, b []netip.Addr) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.SortFunc(a, netip.Addr.Compare)
	slices.SortFunc(b, netip.Addr.Compare)
	return slices.Equal(a, b)
}

func (m *machine) releaseAddress(t *rapid.T) {
	_, a := m.alloc(t)
	addr := advance(m.four.Addr(), rapid.Uint64Range(0, 15).Draw(t, "ordinal"), 0)
	handle := m.by[addr]
	r := Release{Addr: addr}
	if wrong := rapid.Bool().Draw(t, "wrong handle"); wrong && handle != "" {
		r.Handle = "net.wrong"
		if err := a.ReleaseAddress(t.Context(), r); !errors.Is(err, ErrReassigned) {
			t.Fatalf("%s of %s released for another handle: %v", addr, handle, err)
		}
		return
	}
	err := a.ReleaseAddress(t.Context(), r)
	if (handle == "") != errors.Is(err, ErrNotAssigned) || handle != "" && err != nil {
		t.Fatalf("%s, held by %q: %v", addr, handle, err)
	}
	if handle == "" {
		return
	}
	delete(m.by, addr)
	if m.held[handle] = slices.DeleteFunc(m.held[handle], func(a netip.Addr) bool { return a == addr }); len(m.held[handle]) == 0 {
		m.model.forget(handle)
	}
}

func (m *machine) releaseNode(t *rapid.T) {
	node, _ := m.alloc(t)
	_, a := m.alloc(t)
	freed, err := a.ReleaseNode(t.Context(), node)
	var want []netip.Addr
	for handle, of := range m.nodeOf {
		if of == node {
			want = append(want, m.held[handle]...)
			m.model.forget(handle)
		}
	}
	if err != nil || !sameSet(freed, want) {
		t.Fatalf("node %s holds %v: released %v, %v", node, want, freed, err)
	}
}

func (m *machine) configure(t *rapid.T) {
	m.strict = rapid.Bool().Draw(t, "strict")
	if err := ChangeConfig(t.Context(), m.store, func(c *Config) { c.StrictAffinity = m.strict }); err != nil {
		t.Fatal(err)
	}
}

// restart forgets what an allocator remembers, as a new agent does not know it.
func (m *machine) restart(t *rapid.T) {
	node, _ := m.alloc(t)
	m.allocs[node] = New(m.store, node, nil)
}

// check compares model and store, and has the checker go over the store.
func (m *machine) check(t *rapid.T) {
	r, err := audit.Look(t.Context(), m.store, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range r.Integrity() {
		t.Fatalf("the checker: %s", p)
	}
	if len(r.Allocations) != len(m.by) {
		t.Fatalf("%d addresses are held, expected %d", len(r.Allocations), len(m.by))
	}
	for a, handle := range m.by {
		if list := r.Allocations[a.String()]; len(list) != 1 || list[0].Handle != handle || list[0].Node != m.nodeOf[handle] {
			t.Fatalf("%s is held by %v, expected %s of %s", a, list, handle, m.nodeOf[handle])
		}
	}
}

// Any sequence of operations of three nodes leaves what a naive model leaves.
func TestStateMachine(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		m := &machine{store: openStore(t, pool("four", "10.0.0.0/28", func(s *datastore.IPPoolSpec) { s.BlockSize = 30 }),
			pool("six", "fd00::/124", func(s *datastore.IPPoolSpec) { s.BlockSize = 127 })),
			allocs: map[string]*Allocator{}, four: prefix("10.0.0.0/28"), six: prefix("fd00::/124"),
			model: model{held: map[string][]netip.Addr{}, by: map[netip.Addr]string{}, nodeOf: map[string]string{}}}
		defer m.store.Close()
		for _, n := range []string{"n1", "n2", "n3"} {
			m.allocs[n] = New(m.store, n, nil)
		}
		rt.Repeat(map[string]func(*rapid.T){
			"assign": m.assign, "assign again": m.assign, "assign more": m.assign, "assign fixed": m.assignFixed, "release handle": m.releaseHandle,
			"release address": m.releaseAddress, "release node": m.releaseNode, "configure": m.configure, "restart": m.restart, "": m.check,
		})
	})
}
