package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"margay/agent/api"
	"margay/bgp"
	"margay/datastore"
)

// A CalicoNodeStatus asks a node to report on itself in the datastore: so `margayctl node status NODE`, and calicoctl, can
// look at a node from anywhere without another port to guard.

// reportedRoutes bounds the routes of a report: etcd takes values of 1.5 MiB, and a full table does not fit.
const reportedRoutes = 2000

// reportPause is the wait before a report that could not be written is tried again.
const reportPause = 5 * time.Second

// reports are what is known of each CalicoNodeStatus of this node.
type reports map[string]report

type report struct {
	spec string // as it was when we last answered
	next time.Time
}

// reportStatus answers the CalicoNodeStatus resources of this node until ctx is done. It is told of changes by wake.
func (a *Agent) reportStatus(ctx context.Context, wake <-chan struct{}, requests *view[*datastore.Resource]) {
	known, started := reports{}, time.Now()
	for {
		due, pause := known.due(requests.all(), a.cfg.Node, time.Now())
		for _, r := range due {
			if err := a.report(ctx, r, started); err != nil && ctx.Err() == nil {
				a.log.Warn("writing a CalicoNodeStatus", "name", r.Metadata.Name, "err", err)
				known[r.Metadata.Name] = report{spec: string(r.Spec), next: time.Now().Add(reportPause)}
				pause = min(pause, reportPause)
			}
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// due picks the requests of this node that are to be answered now, notes when they will be next, and says how long there
// is nothing to do.
func (k reports) due(requests []*datastore.Resource, node string, now time.Time) (due []*datastore.Resource, pause time.Duration) {
	pause = time.Hour
	there := map[string]bool{}
	for _, r := range requests {
		request, err := datastore.StatusRequestOf(r)
		if err != nil || request.Node != node {
			continue
		}
		name := r.Metadata.Name
		there[name] = true
		old, seen := k[name]
		period := time.Duration(request.UpdatePeriodSeconds) * time.Second
		if !seen || old.spec != string(r.Spec) || !old.next.IsZero() && !now.Before(old.next) {
			due = append(due, r)
			old = report{spec: string(r.Spec)}
			if period > 0 {
				old.next = now.Add(period)
			}
			k[name] = old
		}
		if !old.next.IsZero() {
			pause = min(pause, max(old.next.Sub(now), 0))
		}
	}
	for name := range k {
		if !there[name] {
			delete(k, name)
		}
	}
	return due, pause
}

// report writes this node's state into one CalicoNodeStatus.
func (a *Agent) report(ctx context.Context, r *datastore.Resource, started time.Time) error {
	request, err := datastore.StatusRequestOf(r)
	if err != nil {
		return err
	}
	st := a.status()
	st.Rejected = st.Rejected[:min(len(st.Rejected), reportedRoutes)]
	var routes map[netip.Prefix]bgp.Path
	a.locked(func() {
		if a.speaker != nil {
			routes = a.speaker.Best()
		}
	})
	status, err := json.Marshal(nodeReport(st, routes, request.Classes, started))
	if err != nil {
		return err
	}
	own, err := json.Marshal(st)
	if err != nil {
		return err
	}
	err = datastore.ModifyObject(ctx, a.store, datastore.CalicoNodeStatuses, r.Metadata.Name, func(obj datastore.Object) error {
		stored, ok := obj.(*datastore.Resource)
		if !ok {
			return fmt.Errorf("expected a CalicoNodeStatus, got %T", obj)
		}
		stored.Status = status
		annotations := maps.Clone(stored.Metadata.Annotations)
		if annotations == nil {
			annotations = map[string]string{}
		}
		annotations[datastore.StatusAnnotation] = string(own)
		stored.Metadata.Annotations = annotations
		return nil
	})
	if errors.Is(err, datastore.ErrNotFound) {
		return nil // whoever asked has gone
	}
	return err
}

// nodeReport is an agent's status in Calico's form, with the classes that were asked for.
func nodeReport(st api.Status, routes map[netip.Prefix]bgp.Path, classes []string, started time.Time) datastore.NodeReport {
	out := datastore.NodeReport{LastUpdated: time.Now().UTC().Truncate(time.Second)}
	kinds := map[netip.Addr]string{}
	for _, p := range st.BGP {
		kinds[p.Address] = map[string]string{"node-to-node mesh": "NodeMesh", "node specific": "NodePeer"}[p.Kind]
		if kinds[p.Address] == "" {
			kinds[p.Address] = "GlobalPeer"
		}
	}
	if slices.Contains(classes, "Agent") {
		out.Agent.BIRDV4 = datastore.NodeReportDaemon{State: "NotReady", Version: "margay-agent " + st.Version, RouterID: st.Address.String(),
			LastBootTime: started.UTC().Format(time.RFC3339)}
		if st.Ready {
			out.Agent.BIRDV4.State = "Ready"
		}
		out.Agent.BIRDV6.State = "NotReady" // there is none
	}
	if slices.Contains(classes, "BGP") {
		for _, p := range st.BGP {
			peer := datastore.NodeReportPeer{PeerIP: p.Address.String(), Type: kinds[p.Address], State: p.State, Since: p.Since.UTC().Format(time.RFC3339)}
			up := p.State == "Established"
			switch {
			case p.Address.Is4():
				out.BGP.PeersV4 = append(out.BGP.PeersV4, peer)
				count(up, &out.BGP.EstablishedV4, &out.BGP.NotEstablishedV4)
			default:
				out.BGP.PeersV6 = append(out.BGP.PeersV6, peer)
				count(up, &out.BGP.EstablishedV6, &out.BGP.NotEstablishedV6)
			}
		}
	}
	if slices.Contains(classes, "Routes") {
		prefixes := slices.SortedFunc(maps.Keys(routes), netip.Prefix.Compare)
		for _, prefix := range prefixes[:min(len(prefixes), reportedRoutes)] {
			path := routes[prefix]
			r := datastore.NodeReportRoute{Type: "RIB", Destination: prefix.String(), Gateway: path.NextHop.String()}
			r.LearnedFrom.SourceType, r.LearnedFrom.PeerIP = "BGPPeer", path.Peer.String()
			if kinds[path.Peer] == "NodeMesh" {
				r.LearnedFrom.SourceType = "NodeMesh"
			}
			if prefix.Addr().Is4() {
				out.Routes.RoutesV4 = append(out.Routes.RoutesV4, r)
			} else {
				out.Routes.RoutesV6 = append(out.Routes.RoutesV6, r)
			}
		}
	}
	return out
}

func count(up bool, yes, no *int) {
	if up {
		*yes++
	} else {
		*no++
	}
}

// decodeStatusRequest reads a CalicoNodeStatus that makes sense.
func decodeStatusRequest(kv datastore.KV) (*datastore.Resource, error) {
	obj, err := datastore.DecodeObject(datastore.CalicoNodeStatuses, kv)
	if err != nil {
		return nil, err
	}
	r, ok := obj.(*datastore.Resource)
	if !ok {
		return nil, fmt.Errorf("expected a CalicoNodeStatus, got %T", obj)
	}
	_, err = datastore.StatusRequestOf(r)
	return r, err
}

// startReports begins to answer; it returns when the requests that there are have been read.
func (a *Agent) startReports(ctx context.Context) error {
	wake := make(chan struct{}, 1)
	requests := newView(a.store, a.log, datastore.CalicoNodeStatuses.Prefix(), decodeStatusRequest)
	err := requests.start(ctx, func() {
		select {
		case wake <- struct{}{}:
		default:
		}
	})
	if err != nil {
		return err
	}
	go a.reportStatus(ctx, wake, requests)
	return nil
}
