package ctl

import (
	"encoding/json"
	"io"
	"net/netip"
	"time"

	"margay/agent/api"
)

// capturedLine is a packet as `margayctl capture -o json` prints it, one a line.
type capturedLine struct {
	Node        string      `json:"node"`
	Port        string      `json:"port"`
	Time        time.Time   `json:"time"`
	Direction   string      `json:"direction"`
	Forwarded   bool        `json:"forwarded"`
	Reason      string      `json:"reason,omitempty"`      // of the drop
	Gateway     *netip.Addr `json:"gateway,omitempty"`     // the node to which it went by IP-in-IP
	Sent        int         `json:"sent,omitempty"`        // as how many packets
	SegmentSize int         `json:"segmentSize,omitempty"` // of a superpacket, in bytes
	Length      int         `json:"length"`                // in bytes, of which packet has as many as were kept
	Decoded     string      `json:"decoded"`
	Packet      []byte      `json:"packet"`
}

func writeCapturedLine(w io.Writer, node string, c api.Captured) error {
	line := capturedLine{Node: node, Port: c.Port, Time: c.Time, Direction: c.Direction, Forwarded: c.Forwarded, Reason: c.Reason, Sent: c.Sent,
		SegmentSize: c.SegmentSize, Length: c.Length, Decoded: describe(c.Packet, c.Length), Packet: c.Packet}
	if c.Gateway.IsValid() {
		line.Gateway = &c.Gateway
	}
	return json.NewEncoder(w).Encode(line)
}
