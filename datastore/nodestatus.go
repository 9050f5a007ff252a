package datastore

import (
	"encoding/json"
	"fmt"
	"time"
)

// StatusAnnotation is where margay-agent puts its own status, as JSON, beside the report in Calico's form.
const StatusAnnotation = "margay/status"

// StatusRequest is the spec of a CalicoNodeStatus: which node is asked to report on itself there, and what.
type StatusRequest struct {
	Node                string   `json:"node"`
	Classes             []string `json:"classes"`             // Agent, BGP, Routes
	UpdatePeriodSeconds uint32   `json:"updatePeriodSeconds"` // 0: once
}

// NewStatusRequest makes a CalicoNodeStatus that asks.
func NewStatusRequest(name string, request StatusRequest) (*Resource, error) {
	r := CalicoNodeStatuses.New().(*Resource)
	r.Metadata.Name = name
	raw, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	r.Spec = raw
	return r, r.Validate()
}

// StatusRequestOf reads what a CalicoNodeStatus asks for.
func StatusRequestOf(r *Resource) (StatusRequest, error) {
	var request StatusRequest
	if err := r.Validate(); err != nil {
		return request, err
	}
	if err := json.Unmarshal(r.Spec, &request); err != nil {
		return request, fmt.Errorf("spec: %w", JSONError(err))
	}
	return request, nil
}

// NodeReport is the status of a CalicoNodeStatus, field for field Calico's.
type NodeReport struct {
	LastUpdated time.Time         `json:"lastUpdated"`
	Agent       NodeReportAgent   `json:"agent"`
	BGP         NodeReportBGP     `json:"bgp"`
	Routes      NodeReportRouting `json:"routes"`
}

// NodeReportAgent is about the BGP daemons; Margay's speaker is reported as the one of IPv4.
type NodeReportAgent struct {
	BIRDV4 NodeReportDaemon `json:"birdV4"`
	BIRDV6 NodeReportDaemon `json:"birdV6"`
}

// NodeReportDaemon is about one BGP daemon.
type NodeReportDaemon struct {
	State                   string `json:"state,omitempty"` // Ready, NotReady
	Version                 string `json:"version,omitempty"`
	RouterID                string `json:"routerID,omitempty"`
	LastBootTime            string `json:"lastBootTime,omitempty"`
	LastReconfigurationTime string `json:"lastReconfigurationTime,omitempty"`
}

// NodeReportBGP is about the sessions.
type NodeReportBGP struct {
	EstablishedV4    int              `json:"numberEstablishedV4"`
	NotEstablishedV4 int              `json:"numberNotEstablishedV4"`
	EstablishedV6    int              `json:"numberEstablishedV6"`
	NotEstablishedV6 int              `json:"numberNotEstablishedV6"`
	PeersV4          []NodeReportPeer `json:"peersV4,omitempty"`
	PeersV6          []NodeReportPeer `json:"peersV6,omitempty"`
}

// NodeReportPeer is one session.
type NodeReportPeer struct {
	PeerIP string `json:"peerIP,omitempty"`
	Type   string `json:"type,omitempty"`  // NodeMesh, NodePeer, GlobalPeer
	State  string `json:"state,omitempty"` // Idle … Established (RFC 4271 8.2.2)
	Since  string `json:"since,omitempty"`
}

// NodeReportRouting is about routes.
type NodeReportRouting struct {
	RoutesV4 []NodeReportRoute `json:"routesV4,omitempty"`
	RoutesV6 []NodeReportRoute `json:"routesV6,omitempty"`
}

// NodeReportRoute is one route.
type NodeReportRoute struct {
	Type        string `json:"type,omitempty"` // FIB: in the kernel; RIB: learned only
	Destination string `json:"destination,omitempty"`
	Gateway     string `json:"gateway,omitempty"`
	Interface   string `json:"interface,omitempty"`
	LearnedFrom struct {
		SourceType string `json:"sourceType,omitempty"` // NodeMesh, BGPPeer
		PeerIP     string `json:"peerIP,omitempty"`
	} `json:"learnedFrom"`
}
