package agent

import (
	"context"
	"errors"
	"net/http"
	"path/filepath"
	"slices"
	"time"

	"margay/agent/api"
	"margay/bgp"
	"margay/cni/server"
	"margay/internal/version"
	"margay/vrouter/rpc"
)

// serveStatus answers what is asked about this node on the agent's socket until ctx is done, or stop is called.
func (a *Agent) serveStatus(ctx context.Context) (stop func(), err error) {
	l, err := server.Listen(filepath.Join(a.cfg.RunDir, "agent.sock"))
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	a.handleDiagnostics(mux)
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go func() {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			a.log.Error("status server", "err", err)
		}
	}()
	return func() { _ = srv.Close() }, nil
}

// status reports what this agent knows. It may be called at any time, from any goroutine.
func (a *Agent) status() api.Status {
	a.mu.Lock()
	st := api.Status{
		Node: a.cfg.Node, Version: version.String(), Ready: a.ready, ASNumber: a.as,
		Address: a.underlay.Prefix.Addr(), Underlay: a.underlay.Interface, MTU: PodMTU(a.underlay.MTU, a.desired.Encap),
		TunnelAddress: a.tunnel, Blocks: slices.Clone(a.desired.Announce),
	}
	if a.failure != nil {
		st.Reason = a.failure.Error()
	}
	for _, r := range a.desired.Rejected {
		st.Rejected = append(st.Rejected, api.Rejected{Prefix: r.Prefix, Peer: r.Peer, Why: r.Why})
	}
	speaker, plane := a.speaker, a.plane
	a.mu.Unlock()
	if plane != nil {
		vr, ok := plane.status()
		st.VRouter = api.VRouter{Connected: ok, Version: vr.Version, Instance: vr.Instance, Port: vr.Port, Routes: vr.Routes, Stale: vr.Stale}
		if ok {
			st.VRouter.PathMTUs = pathMTUsOf(vr.PathMTUs, time.Now())
		}
	}
	if speaker != nil {
		st.BGP = peersOf(speaker)
	}
	return st
}

func pathMTUsOf(all []rpc.PathMTU, now time.Time) (out []api.PathMTU) {
	for _, p := range all {
		out = append(out, api.PathMTU{Node: p.Gateway, MTU: p.MTU, Learned: p.Learned, Age: int(now.Sub(p.Learned).Seconds()), Expires: p.Expires})
	}
	return out
}

func peersOf(speaker *bgp.Speaker) (peers []api.Peer) {
	for _, p := range speaker.Peers() {
		peers = append(peers, api.Peer{Address: p.Addr, AS: p.AS, Kind: p.Kind, State: p.State, Since: p.Since,
			Received: p.Received, Advertised: p.Advertised, LastError: p.LastError})
	}
	return peers
}
