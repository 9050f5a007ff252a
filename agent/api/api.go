// Package api is the agent's status contract: what GET /v1/status on the agent's unix socket answers, and the
// client that margayctl asks with. It holds types only, so that the tools that read a status link neither BGP nor etcd.
package api

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// StatusPath is the path under which the agent serves its Status.
const StatusPath = "/v1/status"

// maxStatus bounds what Get reads, in bytes.
const maxStatus = 16 << 20

// Status is what one agent knows about its node.
type Status struct {
	Node    string `json:"node"`
	Version string `json:"version"`
	// Ready is true once the agent can serve CNI ADD and has its first BGP table; Reason says what it waits for.
	Ready         bool           `json:"ready"`
	Reason        string         `json:"reason,omitempty"`
	Address       netip.Addr     `json:"address"`
	Underlay      string         `json:"underlay"`
	MTU           int            `json:"mtu"` // of vr0 and the pods, bytes
	ASNumber      uint32         `json:"asNumber"`
	TunnelAddress netip.Addr     `json:"tunnelAddress"`
	Blocks        []netip.Prefix `json:"blocks"` // announced by this node
	VRouter       VRouter        `json:"vrouter"`
	BGP           []Peer         `json:"bgp"`
	Rejected      []Rejected     `json:"rejected,omitempty"`
}

// VRouter is the agent's view of the data plane beside it.
type VRouter struct {
	Connected bool   `json:"connected"`
	Version   string `json:"version,omitempty"`
	Instance  string `json:"instance,omitempty"` // another one is another process
	Port      string `json:"port,omitempty"`     // what was chosen for attachment and I/O
	Routes    int    `json:"routes"`
	Stale     int    `json:"stale"`
	// PathMTUs are the ways to other nodes on which a router has told of a narrower link, sorted by node.
	PathMTUs []PathMTU `json:"pathMTUs,omitempty"`
}

// PathMTU is the longest outer packet that the way to a node is known to carry.
type PathMTU struct {
	Node    netip.Addr `json:"node"`
	MTU     int        `json:"mtu"` // bytes
	Learned time.Time  `json:"learned"`
	// Age is how long ago that was when the status was made, in seconds.
	Age     int       `json:"ageSeconds"`
	Expires time.Time `json:"expires"` // a longer one is tried again then: RFC 1191, 6.3
}

// Peer is one BGP session of this node.
type Peer struct {
	Address    netip.Addr `json:"address"`
	AS         uint32     `json:"asNumber"`
	Kind       string     `json:"type"` // calicoctl's PEER TYPE
	State      string     `json:"state"`
	Since      time.Time  `json:"since"`
	Received   int        `json:"received"`   // prefixes
	Advertised int        `json:"advertised"` // prefixes
	LastError  string     `json:"lastError,omitempty"`
}

// Rejected is a route a peer sent and the import rules refused.
type Rejected struct {
	Prefix netip.Prefix `json:"prefix"`
	Peer   netip.Addr   `json:"peer"`
	Why    string       `json:"why"`
}

// Get asks the agent that listens on the unix socket for its status.
func Get(ctx context.Context, socket string) (Status, error) {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent"+StatusPath, nil)
	if err != nil {
		return Status{}, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return Status{}, fmt.Errorf("margay-agent does not answer on %s: is it running on this node?", socket)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return Status{}, fmt.Errorf("margay-agent on %s: %s", socket, resp.Status)
	}
	var st Status
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxStatus)).Decode(&st); err != nil {
		return Status{}, fmt.Errorf("margay-agent on %s: status is not what this version expects: %w", socket, err)
	}
	return st, nil
}
