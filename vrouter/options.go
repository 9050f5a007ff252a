package vrouter

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"margay/vrouter/fib"
	"margay/vrouter/packet"
)

// DSCPMode says what becomes of the DSCP across the tunnel (RFC 2983, section 3).
type DSCPMode uint8

// The modes. The zero mode is what the kernel's tunl0 does.
const (
	DSCPInherit DSCPMode = iota // into the tunnel the inner one is copied, out of it the inner one stays
	DSCPUniform                 // the inner one is copied, and comes out as it is in the tunnel then
	DSCPPipe                    // in the tunnel it is the operator's, and the inner one stays
)

// DSCP is a mode, and the value of the pipe.
type DSCP struct {
	Mode  DSCPMode
	Value uint8 // 0 to 63, for DSCPPipe
}

// ParseDSCP reads "inherit", "uniform", "pipe" or "pipe:N" with N from 0 to 63.
func ParseDSCP(s string) (DSCP, error) {
	mode, value, found := strings.Cut(s, ":")
	switch {
	case s == "inherit":
		return DSCP{}, nil
	case s == "uniform":
		return DSCP{Mode: DSCPUniform}, nil
	case mode == "pipe" && !found:
		return DSCP{Mode: DSCPPipe}, nil
	case mode == "pipe":
		if n, err := strconv.ParseUint(value, 10, 6); err == nil {
			return DSCP{Mode: DSCPPipe, Value: uint8(n)}, nil
		}
	}
	return DSCP{}, fmt.Errorf("dscp %q: expected inherit, uniform, pipe or pipe:N with N from 0 to 63", s)
}

// Options are the operator's, and stay for the life of the process. The zero Options are the defaults, but for ICMPRate.
type Options struct {
	DSCP DSCP
	// ClampMSS lowers the maximum segment size that TCP connections through the tunnel announce to what the way carries.
	ClampMSS bool
	// NestedTunnels lets packets of protocol 4 and 41 through, which are tunnels of the pods' own.
	NestedTunnels bool
	// AcceptSources are inner sources that any node of the cluster may send to us: clients that enter the cluster there
	// although no route leads back to them by that node. IPv4.
	AcceptSources []netip.Prefix
	// ICMPRate is how many ICMP errors each worker sends in a second, at most, bursts of half as many included; 0: none.
	ICMPRate int
}

// DefaultICMPRate is that of the kernel's icmp_msgs_per_sec.
const DefaultICMPRate = 1000

const maxICMPRate = 1_000_000

// Validate returns an error that names the first field that is wrong, and what was expected.
func (o Options) Validate() error {
	if o.DSCP.Mode > DSCPPipe || o.DSCP.Value > 63 {
		return fmt.Errorf("options: dscp %v: expected a known mode and 0 to 63", o.DSCP)
	}
	for i, p := range o.AcceptSources {
		if !p.IsValid() || !p.Addr().Is4() || p != p.Masked() {
			return fmt.Errorf("options: accepted source [%d] %q: expected an IPv4 prefix without host bits", i, p)
		}
	}
	if o.ICMPRate < 0 || o.ICMPRate > maxICMPRate {
		return fmt.Errorf("options: icmp rate %d: expected 0 to %d", o.ICMPRate, maxICMPRate)
	}
	return nil
}

// SetOptions replaces the options.
func (r *Router) SetOptions(o Options) error {
	if err := o.Validate(); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	next := *r.state.Load()
	o.AcceptSources = slices.Clone(o.AcceptSources)
	next.options, next.pipe = o, o.DSCP.Mode == DSCPPipe
	r.publish(&next)
	return nil
}

// accepts reports whether the operator has made an exception for the source of inner. There is none for what belongs to
// this node, nor for what is nobody's: back is the answer for the source.
func (s *state) accepts(inner packet.IPv4, back fib.Hop) bool {
	if len(s.options.AcceptSources) == 0 || back.Kind() == fib.KindLocal || inner.SrcU32() == s.address ||
		!packet.Unicast(inner.SrcU32()) {
		return false
	}
	source := inner.Src()
	for _, p := range s.options.AcceptSources {
		if p.Contains(source) {
			return true
		}
	}
	return false
}
