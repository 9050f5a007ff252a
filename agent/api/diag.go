package api

import (
	"net/netip"
	"time"
)

// The paths of what explains a node. On the unix socket root alone may ask, on TCP who holds the cluster's token.
const (
	TracePath   = "/v1/trace"
	DropsPath   = "/v1/drops"
	CapturePath = "/v1/capture"
)

// Where the datastore says how to ask other nodes' agents: DiagToken holds the cluster's token, DiagNodes and a node's name
// its Endpoint, as JSON.
const (
	DiagToken = "/margay/v1/diag/token"
	DiagNodes = "/margay/v1/diag/nodes/"
)

// DefaultDiagPort is the TCP port, on the node's address, of what explains it.
const DefaultDiagPort = 9179

// Endpoint is where an agent answers, and the certificate (DER) that it answers with: who can read it can tell the agent
// from anybody else.
type Endpoint struct {
	Address     netip.AddrPort `json:"address"`
	Certificate []byte         `json:"certificate"`
}

// Entry is how a packet comes to a node.
type Entry string

// The entries.
const (
	EntryPod      Entry = "pod"      // from the pod that has its source address
	EntryHost     Entry = "host"     // from a process of the node
	EntryUnderlay Entry = "underlay" // from another node, in IP-in-IP or as it is
)

// TraceRequest asks what would become of a packet at one node.
type TraceRequest struct {
	Entry  Entry  `json:"entry"`
	Packet []byte `json:"packet"` // IPv4, from its header on
	// State is what this node's connection tracker takes the packet for.
	State ConnState `json:"state,omitempty"`
	// Question is who has carried the question, of which the packet is an answer, through this node: what it has said itself.
	Question Carrier `json:"question,omitempty"`
	// NoEcho keeps the node from asking the network between it and the next node by an ICMP echo.
	NoEcho bool `json:"noEcho,omitempty"`
}

// ConnState is the state of a connection.
type ConnState string

// The states. A packet that answers one that has passed this node belongs to an established connection; of an answer whose
// question went another way it is not known what the tracker says.
const (
	StateNew         ConnState = ""
	StateEstablished ConnState = "established"
	StateUnknown     ConnState = "unknown"
)

// Carrier is who carries a packet through a node.
type Carrier string

// The carriers.
const (
	CarrierUnknown Carrier = ""        // an older agent does not tell
	CarrierKernel  Carrier = "kernel"  // the node's own stack has a part in it: its connection tracker sees the packet
	CarrierVRouter Carrier = "vrouter" // the vRouter alone
)

// Outcome is what becomes of a packet at one node.
type Outcome string

// The outcomes.
const (
	Delivered Outcome = "delivered" // to a pod of this node, or to the node itself
	Forwarded Outcome = "forwarded" // to another node of the cluster
	Left      Outcome = "left"      // the cluster: what becomes of it there nobody here knows
	Dropped   Outcome = "dropped"
	Unknown   Outcome = "unknown" // somebody could not be asked
)

// Rung is one step of a packet's way through a node, and who decides about it: pod, kernel, vrouter, agent.
type Rung struct {
	By     string `json:"by"`
	Name   string `json:"name"`
	Detail string `json:"detail,omitempty"`
	Passed bool   `json:"passed"`
	// Doubtful is set where it cannot be told whether the packet passes; the trace goes on as if it did.
	Doubtful bool `json:"doubtful,omitempty"`
}

// Doubt is what keeps a trace from being certain: at a rung it could not be told whether the packet passes.
type Doubt struct {
	By     string `json:"by"`
	Rung   string `json:"rung"`
	Reason string `json:"reason"` // for programs
	Why    string `json:"why"`
	Fix    string `json:"fix,omitempty"` // how to find out
}

// Segment is a packet's way through one node.
type Segment struct {
	Node    string     `json:"node"`
	Address netip.Addr `json:"address"`
	Rungs   []Rung     `json:"rungs"`
	Outcome Outcome    `json:"outcome"`
	Carrier Carrier    `json:"carrier,omitempty"`
	// Reason is a word for programs; Why and Fix are sentences for people. They are empty for a packet that passes.
	Reason string `json:"reason,omitempty"`
	Why    string `json:"why,omitempty"`
	Fix    string `json:"fix,omitempty"`
	// Doubts, if there are any, make a packet that is delivered or goes on one of which that is not certain.
	Doubts []Doubt `json:"doubts,omitempty"`
	// Caveats are worth knowing, and change nothing about the outcome.
	Caveats []string   `json:"caveats,omitempty"`
	Next    netip.Addr `json:"next"`          // the next node, for Forwarded; the gateway, for Left
	Via     string     `json:"via,omitempty"` // the interface by which it leaves or is delivered
	// NextMAC is the hardware address that Next has for this node, Pinned set when somebody has made that entry permanent; MAC
	// is that of this node's own underlay interface.
	NextMAC string `json:"nextMAC,omitempty"`
	Pinned  bool   `json:"pinned,omitempty"`
	MAC     string `json:"mac,omitempty"`
	Packet  []byte `json:"packet,omitempty"` // as it leaves
	Echo    *Echo  `json:"echo,omitempty"`   // how the network between this node and the next one was asked
	Peers   []Peer `json:"peers,omitempty"`  // this node's BGP sessions, for a packet that found no route
}

// Echo is an ICMP echo that one node has sent to the next, the way that the packet goes.
type Echo struct {
	From     netip.Addr `json:"from"`
	To       netip.Addr `json:"to"`
	IPIP     bool       `json:"ipip"` // it went by IP-in-IP, from tunnel address to tunnel address
	Size     int        `json:"size"` // of the whole IP packet, without the outer header, in bytes
	DF       bool       `json:"df"`
	Answered bool       `json:"answered"`
}

// Drops is what one node has dropped since its vRouter and its kernel began to count.
type Drops struct {
	Node     string       `json:"node"`
	VRouter  string       `json:"vrouterError,omitempty"` // why the vRouter's own are missing
	Counters []Counter    `json:"counters"`               // by reason; those that are zero are left out
	Flows    []DropFlow   `json:"flows"`
	Samples  []DropSample `json:"samples"`
}

// Counter counts what was dropped for one reason, and By says who did: vrouter or kernel.
type Counter struct {
	By      string `json:"by"`
	Reason  string `json:"reason"`
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes,omitempty"`
}

// DropFlow counts the drops of one pair of addresses. Without a reason it is the sum of the pairs that had to make room for others.
type DropFlow struct {
	Reason      string     `json:"reason,omitempty"`
	By          string     `json:"by,omitempty"` // as in Counter; empty: vrouter
	Pod         netip.Addr `json:"pod,omitzero"` // the address of the pod that sent them, where the source is another's
	Source      netip.Addr `json:"source"`
	Destination netip.Addr `json:"destination"`
	Packets     uint64     `json:"packets"`
	Bytes       uint64     `json:"bytes"`
}

// DropSample is a packet that the vRouter dropped, or the beginning of it.
type DropSample struct {
	Number    uint64    `json:"number"`
	Time      time.Time `json:"time"`
	Direction string    `json:"direction"`
	Reason    string    `json:"reason"`
	Length    int       `json:"length"` // of the packet, in bytes
	Packet    []byte    `json:"packet"`
}

// CaptureRequest says what to capture. Filter is in the pcap filter language as docs/trace.md describes it.
type CaptureRequest struct {
	Filter  string
	Outer   bool // the filter is about the packet on the wire, not about the inner one
	SnapLen int  // bytes of each packet; 0: all
}

// Captured is one line of the answer to a capture: a packet, or, without one, word that the capture runs, how many packets
// it has lost, or why it has ended.
type Captured struct {
	Time        time.Time  `json:"time"`
	Port        string     `json:"port,omitempty"`
	Direction   string     `json:"direction,omitempty"`
	Forwarded   bool       `json:"forwarded"`
	Reason      string     `json:"reason,omitempty"`
	Gateway     netip.Addr `json:"gateway"`
	Sent        int        `json:"sent,omitempty"`
	Length      int        `json:"length,omitempty"`
	Packet      []byte     `json:"packet,omitempty"`
	SegmentSize int        `json:"segmentSize,omitempty"`
	PartialSum  bool       `json:"partialChecksum,omitempty"`
	Lost        uint64     `json:"lost,omitempty"`
	Error       string     `json:"error,omitempty"`
}
