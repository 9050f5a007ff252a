package api

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"time"
)

// ProbePath is where a real packet is sent, and watched for.
const ProbePath = "/v1/probe"

// ProbeRequest asks a node to send a packet, or to watch for it and for what answers it.
type ProbeRequest struct {
	Packet []byte `json:"packet"`          // IPv4, whole, from its header on; its identification marks it
	Entry  Entry  `json:"entry,omitempty"` // for sending: from the pod that has its source, or from the node
	Watch  bool   `json:"watch,omitempty"`
	// Inside are addresses; where pods of the node have them the watch looks into these, too.
	Inside []netip.Addr `json:"inside,omitempty"`
}

// ProbeReply says how sending went.
type ProbeReply struct {
	Refused string `json:"refused,omitempty"` // what the sender's kernel said instead of sending it
}

// What a watch sees.
const (
	SawProbe  = "probe"
	SawAnswer = "answer"
	SawError  = "icmp error" // about the probe
)

// Sighting is one time that a probe, its answer, or an ICMP error about it passed an interface. Without What it says that the
// watch has begun.
type Sighting struct {
	Node      string    `json:"node"`
	Time      time.Time `json:"time"` // by the node's clock
	What      string    `json:"what,omitempty"`
	Pod       string    `json:"pod,omitempty"` // the address of the pod inside which it was seen; empty: on the node
	Interface string    `json:"interface,omitempty"`
	Outgoing  bool      `json:"outgoing,omitempty"`
	Outer     string    `json:"outer,omitempty"` // the nodes that carry it in IP-in-IP
	Length    int       `json:"length,omitempty"`
	// From, of answers and errors, is who sends it; Type, Code and, for fragmentation needed, MTU are ICMP's.
	From netip.Addr `json:"from"`
	Type byte       `json:"type,omitempty"`
	Code byte       `json:"code,omitempty"`
	MTU  int        `json:"mtu,omitempty"`
}

// SendProbe has the agent's node send a packet.
func (c *Client) SendProbe(ctx context.Context, req ProbeRequest) (r ProbeReply, err error) {
	return r, c.ask(ctx, http.MethodPost, ProbePath, req, &r, maxReply)
}

// WatchProbe calls saw with each sighting until ctx is done, or the agent has watched for long enough. The first has no What:
// it watches.
func (c *Client) WatchProbe(ctx context.Context, req ProbeRequest, saw func(Sighting)) error {
	req.Watch = true
	resp, err := c.do(ctx, http.MethodPost, ProbePath, req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	err = c.lines(resp.Body, func(text []byte) error {
		var s Sighting
		if err := json.Unmarshal(text, &s); err != nil {
			return fmt.Errorf("%s: a line of the watch is not what this version expects: %w", c.name, err)
		}
		saw(s)
		return nil
	})
	if ctx.Err() != nil {
		return nil
	}
	return err
}
