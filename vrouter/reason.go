package vrouter

// Reason names why a packet was dropped. The zero value means that nobody gave one, which is a fault of ours and
// counted as such.
type Reason uint8

// The reasons, in the order of the ladders.
const (
	ReasonNotSet Reason = iota

	// Both directions.
	ReasonNotConfigured      // the agent has not told this node's address yet
	ReasonOffloadUnsupported // a superpacket of a kind that cannot be split
	ReasonSendFailed         // the kernel refused it: no route to the node, a filter, an interface that is down
	ReasonSendTooBig         // the kernel refused it: EMSGSIZE
	ReasonSendQueueFull      // the socket's buffer stayed full

	// Encapsulation: from a pod of this node to another node.
	ReasonNotIPv4      // IPv6 or nothing known
	ReasonMalformed    // header or lengths wrong (RFC 1812, 5.2.2)
	ReasonBadChecksum  // IPv4 header checksum wrong
	ReasonNoRoute      // no route to the destination
	ReasonBlackhole    // the longest match is a drop route
	ReasonNoPod        // the destination is in a block of this node, but no pod has it: the kernel's route led here
	ReasonDirectRoute  // the kernel should have routed it unencapsulated
	ReasonGatewaySelf  // the route's gateway is this node
	ReasonPacketTooBig // longer than vr0's MTU, or than an outer header can tell

	// From a pod, where the vRouter reads its interface itself.
	ReasonSpoofed    // the source is not the pod's address
	ReasonTTLExpired // its time to live is over

	// Decapsulation: from another node to a pod of this node.
	ReasonOuterMalformed   // outer header wrong, or not protocol 4
	ReasonOuterNotForUs    // outer destination is not this node's address
	ReasonOuterFragment    // a fragment of an outer packet
	ReasonOuterSourceNode  // outer source is no node of this cluster
	ReasonInnerMalformed   // inner header wrong
	ReasonECNIllegal       // outer congestion mark on an inner packet that cannot carry one (RFC 6040, 4.2)
	ReasonNestedTunnel     // a tunnel inside the tunnel, on the way in or out
	ReasonInnerSource      // the route back to the inner source does not lead to the node that sent it
	ReasonInnerDestination // the inner destination is no pod or block of this node

	reasonCount
)

var reasonNames = [reasonCount]string{
	ReasonNotSet:             "not_set",
	ReasonNotConfigured:      "not_configured",
	ReasonOffloadUnsupported: "offload_unsupported",
	ReasonNotIPv4:            "not_ipv4",
	ReasonMalformed:          "malformed",
	ReasonBadChecksum:        "bad_checksum",
	ReasonNoRoute:            "no_route",
	ReasonBlackhole:          "blackhole",
	ReasonNoPod:              "no_pod",
	ReasonDirectRoute:        "direct_route",
	ReasonGatewaySelf:        "gateway_is_self",
	ReasonPacketTooBig:       "packet_too_big",
	ReasonSendFailed:         "send_failed",
	ReasonSendTooBig:         "send_emsgsize",
	ReasonSendQueueFull:      "send_queue_full",
	ReasonSpoofed:            "spoofed",
	ReasonTTLExpired:         "ttl_expired",
	ReasonOuterMalformed:     "outer_malformed",
	ReasonOuterNotForUs:      "outer_not_for_us",
	ReasonOuterFragment:      "outer_fragment",
	ReasonOuterSourceNode:    "outer_source_not_node",
	ReasonInnerMalformed:     "inner_malformed",
	ReasonECNIllegal:         "ecn_illegal",
	ReasonNestedTunnel:       "nested_tunnel",
	ReasonInnerSource:        "inner_source_not_routed_to_node",
	ReasonInnerDestination:   "inner_destination_not_local",
}

// String returns the reason as counters name it: drop_ and this.
func (r Reason) String() string {
	if r < reasonCount {
		return reasonNames[r]
	}
	return "unknown"
}

// Reasons returns every reason there is.
func Reasons() []Reason {
	all := make([]Reason, reasonCount)
	for i := range all {
		all[i] = Reason(i)
	}
	return all
}
