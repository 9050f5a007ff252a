package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/spf13/pflag"

	"margay/vrouter"
	"margay/vrouter/port"
)

// routerFlags are the operator's options about how packets are treated.
type routerFlags struct {
	dscp     string
	clampMSS bool
	nested   bool
	accept   []string
	icmpRate int
}

func (r *routerFlags) add(f *pflag.FlagSet) {
	f.StringVar(&r.dscp, "dscp", "inherit", "DSCP across the tunnel, `mode`: inherit, uniform, pipe or pipe:N (RFC 2983)")
	f.BoolVar(&r.clampMSS, "clamp-mss", false, "lower the MSS that TCP connections announce to what the tunnel carries")
	f.BoolVar(&r.nested, "nested-tunnels", false, "let the pods' own IP-in-IP and 6in4 through the tunnel")
	f.StringSliceVar(&r.accept, "accept-source", nil, "inner source `prefix` that any node may send, for clients that enter the cluster there; may be repeated")
	f.IntVar(&r.icmpRate, "icmp-rate", vrouter.DefaultICMPRate, "ICMP errors per second, at most; 0 sends none")
}

func (r *routerFlags) options() (vrouter.Options, error) {
	o := vrouter.Options{ClampMSS: r.clampMSS, NestedTunnels: r.nested, ICMPRate: r.icmpRate}
	var err error
	if o.DSCP, err = vrouter.ParseDSCP(r.dscp); err != nil {
		return o, fmt.Errorf("--%w", err)
	}
	for _, s := range r.accept {
		p, err := netip.ParsePrefix(s)
		if err != nil || !p.Addr().Is4() || p != p.Masked() {
			return o, fmt.Errorf("--accept-source %q: expected an IPv4 prefix without host bits, as in 192.0.2.0/24", s)
		}
		o.AcceptSources = append(o.AcceptSources, p)
	}
	if err := o.Validate(); err != nil {
		return o, fmt.Errorf("--icmp-rate %d: %w", r.icmpRate, err)
	}
	return o, nil
}

// pathMTUInterval is how often what has been learned of the way to other nodes is looked through for what is too old.
const pathMTUInterval = 10 * time.Second

// sideways are the sockets beside the ports: by some go ICMP errors of ours, by the other come those about the outer
// packets.
type sideways struct {
	replies []*port.Reply // one for each worker that answers
	relay   *port.Reply   // for what is heard
	icmp    *port.ICMP
}

func openSideways(answering int) (_ *sideways, err error) {
	s := &sideways{}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	for range answering {
		reply, err := port.OpenReply()
		if err != nil {
			return nil, err
		}
		s.replies = append(s.replies, reply)
	}
	if s.relay, err = port.OpenReply(); err != nil {
		return nil, err
	}
	if s.icmp, err = port.OpenICMP(); err != nil {
		return nil, err
	}
	return s, nil
}

// listen tells the router what is heard, until stop.
func (s *sideways) listen(router *vrouter.Router, log *slog.Logger) error {
	reply := []*vrouter.Packet{vrouter.NewPacket()}
	return s.icmp.Listen(pathMTUInterval, func(b []byte) {
		if router.Relay(b, time.Now(), reply[0]) {
			s.relay.Send(reply) // that it is lost is nobody's harm: the next packet is answered again
		}
		if p, ok := router.LearnPathMTU(b, time.Now()); ok {
			log.Info("the way to a node has become narrower", "node", p.Gateway, "mtu", p.MTU, "until", p.Expires.Format(time.RFC3339))
		}
	}, func() { router.ExpirePathMTU(time.Now()) })
}

func (s *sideways) stop() {
	for _, r := range s.replies {
		r.Stop()
	}
	s.icmp.Stop()
}

func (s *sideways) close() error {
	if s == nil {
		return nil
	}
	var errs []error
	for _, r := range append(s.replies, s.relay) {
		if r != nil {
			errs = append(errs, r.Close())
		}
	}
	if s.icmp != nil {
		errs = append(errs, s.icmp.Close())
	}
	return errors.Join(errs...)
}
