package rpc

import (
	"fmt"
	"net/netip"

	"margay/vrouter"
	pb "margay/vrouter/rpc/vrouterpb"
)

// The two tables are each other's inverse; a kind that is in neither is refused.
var (
	kindToWire = map[vrouter.Kind]pb.Kind{
		vrouter.KindDrop:   pb.Kind_KIND_DROP,
		vrouter.KindLocal:  pb.Kind_KIND_LOCAL,
		vrouter.KindTunnel: pb.Kind_KIND_TUNNEL,
		vrouter.KindDirect: pb.Kind_KIND_DIRECT,
	}
	kindFromWire = func() map[pb.Kind]vrouter.Kind {
		m := make(map[pb.Kind]vrouter.Kind, len(kindToWire))
		for k, w := range kindToWire {
			m[w] = k
		}
		return m
	}()
)

func addrToWire(a netip.Addr) []byte {
	if !a.IsValid() {
		return nil
	}
	return a.AsSlice()
}

// addrFromWire accepts absence, as the invalid Addr: whether an address has to be there is for the router to say.
func addrFromWire(field string, b []byte) (netip.Addr, error) {
	if len(b) == 0 {
		return netip.Addr{}, nil
	}
	a, ok := netip.AddrFromSlice(b)
	if !ok {
		return netip.Addr{}, fmt.Errorf("%s: address of %d bytes: expected 4 or 16", field, len(b))
	}
	return a, nil
}

func addrsToWire(addrs []netip.Addr) [][]byte {
	out := make([][]byte, len(addrs))
	for i, a := range addrs {
		out[i] = addrToWire(a)
	}
	return out
}

func addrsFromWire(field string, list [][]byte) ([]netip.Addr, error) {
	out := make([]netip.Addr, len(list))
	for i, b := range list {
		a, err := addrFromWire(fmt.Sprintf("%s[%d]", field, i), b)
		if err != nil {
			return nil, err
		}
		out[i] = a
	}
	return out, nil
}

func prefixToWire(p netip.Prefix) *pb.Prefix {
	if !p.IsValid() {
		return nil
	}
	return &pb.Prefix{Address: p.Addr().AsSlice(), Bits: uint32(p.Bits())}
}

func prefixFromWire(field string, p *pb.Prefix) (netip.Prefix, error) {
	a, err := addrFromWire(field, p.GetAddress())
	if err != nil {
		return netip.Prefix{}, err
	}
	if !a.IsValid() || p.GetBits() > uint32(a.BitLen()) {
		return netip.Prefix{}, fmt.Errorf("%s: %s/%d: expected an address and a prefix length within it", field, a, p.GetBits())
	}
	return netip.PrefixFrom(a, int(p.GetBits())), nil
}

func routeToWire(r Route, stale bool) *pb.Route {
	out := &pb.Route{
		Prefix:  prefixToWire(r.Prefix),
		Kind:    kindToWire[r.NextHop.Kind],
		Gateway: addrToWire(r.NextHop.Gateway),
		Stale:   stale,
	}
	if r.NextHop.IsGroup() {
		out.MoreGateways = addrsToWire(r.NextHop.Gateways()[1:])
	}
	return out
}

func routeFromWire(field string, r *pb.Route) (Route, error) {
	prefix, err := prefixFromWire(field+".prefix", r.GetPrefix())
	if err != nil {
		return Route{}, err
	}
	kind, ok := kindFromWire[r.GetKind()]
	if !ok {
		return Route{}, fmt.Errorf("%s.kind: %s: expected one of drop, local, tunnel, direct", field, r.GetKind())
	}
	gateway, err := addrFromWire(field+".gateway", r.GetGateway())
	if err != nil {
		return Route{}, err
	}
	if len(r.GetMoreGateways()) == 0 {
		return Route{Prefix: prefix, NextHop: NextHop{Kind: kind, Gateway: gateway}}, nil
	}
	gateways, err := addrsFromWire(field+".more_gateways", r.GetMoreGateways())
	if err != nil {
		return Route{}, err
	}
	return Route{Prefix: prefix, NextHop: Multipath(kind, append(gateways, gateway)...)}, nil
}

func configToWire(c Config) *pb.Config {
	return &pb.Config{NodeAddress: addrToWire(c.NodeAddress), Underlay: c.Underlay, Mtu: uint32(max(c.MTU, 0)),
		TunnelAddress: addrToWire(c.TunnelAddress)}
}

func configFromWire(c *pb.Config) (Config, error) {
	a, err := addrFromWire("config.node_address", c.GetNodeAddress())
	if err != nil {
		return Config{}, err
	}
	tunnel, err := addrFromWire("config.tunnel_address", c.GetTunnelAddress())
	if err != nil {
		return Config{}, err
	}
	return Config{NodeAddress: a, Underlay: c.GetUnderlay(), MTU: int(c.GetMtu()), TunnelAddress: tunnel}, nil
}

func updateToWire(u Update) *pb.UpdateRequest {
	req := &pb.UpdateRequest{AddNodes: addrsToWire(u.AddNodes), DelNodes: addrsToWire(u.DelNodes), DelPods: addrsToWire(u.DelPods)}
	for _, p := range u.AddPods {
		req.AddPods = append(req.AddPods, &pb.Pod{Address: addrToWire(p.Address), Interface: p.Interface})
	}
	if u.Config != nil {
		req.Config = configToWire(*u.Config)
	}
	for _, r := range u.Set {
		req.Set = append(req.Set, routeToWire(r, false))
	}
	for _, p := range u.Del {
		req.Del = append(req.Del, prefixToWire(p))
	}
	return req
}

func updateFromWire(req *pb.UpdateRequest) (u Update, err error) {
	if req.GetConfig() != nil {
		c, err := configFromWire(req.GetConfig())
		if err != nil {
			return Update{}, err
		}
		u.Config = &c
	}
	if u.AddNodes, err = addrsFromWire("add_nodes", req.GetAddNodes()); err != nil {
		return Update{}, err
	}
	if u.DelNodes, err = addrsFromWire("del_nodes", req.GetDelNodes()); err != nil {
		return Update{}, err
	}
	if u.DelPods, err = addrsFromWire("del_pods", req.GetDelPods()); err != nil {
		return Update{}, err
	}
	for i, p := range req.GetAddPods() {
		a, err := addrFromWire(fmt.Sprintf("add_pods[%d].address", i), p.GetAddress())
		if err != nil {
			return Update{}, err
		}
		u.AddPods = append(u.AddPods, Pod{Address: a, Interface: p.GetInterface()})
	}
	for i, r := range req.GetSet() {
		route, err := routeFromWire(fmt.Sprintf("set[%d]", i), r)
		if err != nil {
			return Update{}, err
		}
		u.Set = append(u.Set, route)
	}
	for i, p := range req.GetDel() {
		prefix, err := prefixFromWire(fmt.Sprintf("del[%d]", i), p)
		if err != nil {
			return Update{}, err
		}
		u.Del = append(u.Del, prefix)
	}
	return u, nil
}
