package ctl

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"margay/agent/api"
	"margay/datastore"
)

// requestPrefix begins the names of the CalicoNodeStatus resources that `node status NODE` makes and deletes again.
const requestPrefix = "margayctl-"

// requestAge is how old such a resource is when whoever made it cannot be waiting any more.
const requestAge = 5 * time.Minute

// answerTimeout is how long another node's agent has to answer.
const answerTimeout = 10 * time.Second

// remoteStatus asks another node's agent for its status, by way of the datastore: it makes a CalicoNodeStatus, waits until
// the node has filled it in, and deletes it.
func remoteStatus(cmd *cobra.Command, node string) (st api.Status, err error) {
	err = withStoreFor(cmd, callTimeout+answerTimeout, func(ctx context.Context, s *datastore.Store) error {
		if _, err := datastore.GetObject(ctx, s, datastore.Nodes, node); err != nil {
			return calicosWords(err)
		}
		sweepRequests(ctx, s)
		r, err := datastore.NewStatusRequest(requestPrefix+randomName(), datastore.StatusRequest{Node: node, Classes: []string{"Agent", "BGP", "Routes"}})
		if err != nil {
			return err
		}
		if err := datastore.CreateResource(ctx, s, r); err != nil {
			return err
		}
		name := r.Metadata.Name
		defer func() {
			// Also when the user has pressed Ctrl-C.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
			defer cancel()
			if deleteErr := datastore.DeleteObject(ctx, s, datastore.CalicoNodeStatuses, name); !errors.Is(deleteErr, datastore.ErrNotFound) {
				err = errors.Join(err, deleteErr)
			}
		}()
		answer, err := awaitAnswer(ctx, s, name)
		if err != nil {
			return fmt.Errorf("node %s: %w", node, err)
		}
		st, err = statusOf(node, answer)
		return err
	})
	return st, err
}

// randomName keeps two who ask at once apart.
func randomName() string {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails: it crashes the program instead
	return hex.EncodeToString(b[:])
}

// sweepRequests deletes what a margayctl that was killed has left. That it fails is no reason not to go on.
func sweepRequests(ctx context.Context, s *datastore.Store) {
	objs, _, _ := datastore.ListObjects(ctx, s, datastore.CalicoNodeStatuses)
	for _, obj := range objs {
		m := obj.Head().Metadata
		if strings.HasPrefix(m.Name, requestPrefix) && m.CreationTimestamp != nil && time.Since(*m.CreationTimestamp) > requestAge {
			_ = datastore.DeleteObject(ctx, s, datastore.CalicoNodeStatuses, m.Name)
		}
	}
}

// awaitAnswer waits until the node has filled its report in.
func awaitAnswer(ctx context.Context, s *datastore.Store, name string) (*datastore.Resource, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	key := datastore.CalicoNodeStatuses.Key(name)
	kvs, rev, err := s.List(ctx, key)
	if err != nil {
		return nil, err
	}
	events := s.Watch(ctx, key, rev)
	for {
		for _, kv := range kvs {
			if kv.Key != key {
				continue
			}
			obj, err := datastore.DecodeObject(datastore.CalicoNodeStatuses, kv)
			if err != nil {
				return nil, err
			}
			if r, ok := obj.(*datastore.Resource); ok && len(r.Status) > 0 {
				return r, nil
			}
		}
		ev, open := <-events
		switch {
		case !open:
			return nil, fmt.Errorf("no answer within %s: is margay-agent running there? (the last it wrote: `margayctl get node -o yaml`)", answerTimeout)
		case ev.Type == datastore.Put:
			kvs = []datastore.KV{ev.KV}
		case ev.Type == datastore.Delete:
			return nil, errors.New("the request was deleted by somebody else")
		default:
			if kvs, _, err = s.List(ctx, key); err != nil {
				return nil, err
			}
		}
	}
}

// statusOf reads a report: margay-agent's own status beside it, or what a Calico node said.
func statusOf(node string, r *datastore.Resource) (api.Status, error) {
	st := api.Status{Node: node}
	if own := r.Metadata.Annotations[datastore.StatusAnnotation]; own != "" {
		if err := json.Unmarshal([]byte(own), &st); err != nil {
			return st, fmt.Errorf("node %s: annotation %s: not what this version expects: %w", node, datastore.StatusAnnotation, datastore.JSONError(err))
		}
		return st, nil
	}
	var report datastore.NodeReport
	if err := json.Unmarshal(r.Status, &report); err != nil {
		return st, fmt.Errorf("node %s: status: %w", node, datastore.JSONError(err))
	}
	st.Version, st.Ready = report.Agent.BIRDV4.Version, report.Agent.BIRDV4.State == "Ready"
	st.Address, _ = netip.ParseAddr(report.Agent.BIRDV4.RouterID) // none: not shown
	for _, p := range append(report.BGP.PeersV4, report.BGP.PeersV6...) {
		addr, err := netip.ParseAddr(p.PeerIP)
		if err != nil {
			return st, fmt.Errorf("node %s: status.bgp: peerIP %q: expected an address", node, p.PeerIP)
		}
		since, _ := time.Parse(time.RFC3339, p.Since) // BIRD writes it in ways of its own: shown as unknown
		kind := map[string]string{"NodeMesh": "node-to-node mesh", "NodePeer": "node specific", "GlobalPeer": "global"}[p.Type]
		st.BGP = append(st.BGP, api.Peer{Address: addr, Kind: kind, State: p.State, Since: since})
	}
	return st, nil
}
