package agent

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"margay/vrouter/rpc"
)

// pollInterval is how often the agent asks whether the vRouter lives and is still the same process.
const pollInterval = 500 * time.Millisecond

// rpcTimeout bounds one call to the vRouter.
const rpcTimeout = 10 * time.Second

// dataplane drives one vRouter to the desired routes, nodes and configuration. It remembers what it told the vRouter
// and sends differences; to a vRouter that is new, or that the agent meets for the first time, it sends everything
// under mark and sweep. All methods but status are the reconciler's.
type dataplane struct {
	client *rpc.Client
	log    *slog.Logger

	instance string // of the vRouter that has been told what follows; empty: none
	config   rpc.Config
	nodes    map[netip.Addr]bool
	routes   map[netip.Prefix]rpc.NextHop
	pods     map[netip.Addr]string // their interfaces
	swept    bool

	mu     sync.Mutex
	last   rpc.Status
	lastOK bool
}

// watch polls the vRouter until ctx is done and calls changed when it appears, disappears or is another process.
func (d *dataplane) watch(ctx context.Context, changed func()) {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		callCtx, cancel := context.WithTimeout(ctx, rpcTimeout)
		st, err := d.client.Status(callCtx)
		cancel()
		d.mu.Lock()
		differs := (err == nil) != d.lastOK || err == nil && st.Instance != d.last.Instance
		if err == nil {
			d.last = st
		}
		d.lastOK = err == nil
		d.mu.Unlock()
		if differs {
			if err != nil {
				d.log.Warn("the vRouter does not answer; it forwards, or its snapshot will, without us", "err", err)
			} else {
				d.log.Info("vRouter found", "version", st.Version, "instance", st.Instance, "restored", st.Restored, "routes", st.Routes)
			}
			changed()
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// status returns the last answer of the vRouter, and whether it still answers.
func (d *dataplane) status() (rpc.Status, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.last, d.lastOK
}

// apply drives the vRouter to the desired state. Until sweep is set nothing is removed that an earlier agent had
// programmed: its routes may come back with the next End-of-RIB.
func (d *dataplane) apply(ctx context.Context, cfg rpc.Config, want Desired, sweep bool) error {
	st, ok := d.status()
	if !ok {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	if st.Instance != d.instance {
		if _, err := d.client.Begin(ctx); err != nil {
			return err
		}
		d.instance, d.swept = st.Instance, false
		d.config, d.nodes, d.routes = rpc.Config{}, map[netip.Addr]bool{}, map[netip.Prefix]rpc.NextHop{}
		d.pods = map[netip.Addr]string{}
	}
	up, changed := d.difference(cfg, want)
	if changed {
		if err := d.client.Update(ctx, up); err != nil {
			d.instance = "" // what the vRouter holds is unknown now: start over
			return err
		}
		d.remember(up)
	}
	if sweep && !d.swept {
		n, err := d.client.End(ctx)
		if err != nil {
			d.instance = ""
			return err
		}
		d.swept = true
		d.log.Info("resynchronised with the vRouter", "routes", len(d.routes), "nodes", len(d.nodes), "swept", n)
	}
	return nil
}

func (d *dataplane) difference(cfg rpc.Config, want Desired) (up rpc.Update, changed bool) {
	if cfg != d.config {
		up.Config, changed = &cfg, true
	}
	wanted := make(map[netip.Addr]bool, len(want.Nodes))
	for _, n := range want.Nodes {
		wanted[n] = true
		if !d.nodes[n] {
			up.AddNodes = append(up.AddNodes, n)
		}
	}
	for n := range d.nodes {
		if !wanted[n] {
			up.DelNodes = append(up.DelNodes, n)
		}
	}
	for p, nh := range want.Routes {
		if old, ok := d.routes[p]; !ok || old != nh {
			up.Set = append(up.Set, rpc.Route{Prefix: p, NextHop: nh})
		}
	}
	for p := range d.routes {
		if _, ok := want.Routes[p]; !ok {
			up.Del = append(up.Del, p)
		}
	}
	here := make(map[netip.Addr]bool, len(want.Pods))
	for _, p := range want.Pods {
		here[p.Address] = true
		if d.pods[p.Address] != p.Interface {
			up.AddPods = append(up.AddPods, p)
		}
	}
	for addr := range d.pods {
		if !here[addr] {
			up.DelPods = append(up.DelPods, addr)
		}
	}
	changed = changed || len(up.AddNodes)+len(up.DelNodes)+len(up.Set)+len(up.Del)+len(up.AddPods)+len(up.DelPods) > 0
	return up, changed
}

func (d *dataplane) remember(up rpc.Update) {
	if up.Config != nil {
		d.config = *up.Config
	}
	for _, n := range up.AddNodes {
		d.nodes[n] = true
	}
	for _, n := range up.DelNodes {
		delete(d.nodes, n)
	}
	for _, r := range up.Set {
		d.routes[r.Prefix] = r.NextHop
	}
	for _, p := range up.Del {
		delete(d.routes, p)
	}
	for _, p := range up.AddPods {
		d.pods[p.Address] = p.Interface
	}
	for _, addr := range up.DelPods {
		delete(d.pods, addr)
	}
}
