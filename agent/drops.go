package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"margay/agent/api"
	"margay/vrouter/rpc"
)

// drops gathers what was dropped on this node: by the vRouter, by the kernel around it, by the anti-spoofing rules, and in the
// kernel's own IP layer.
func (a *Agent) drops(ctx context.Context, since uint64) api.Drops {
	d := api.Drops{Node: a.cfg.Node, Counters: []api.Counter{}, Flows: []api.DropFlow{}, Samples: []api.DropSample{}}
	if !a.isOpen() {
		d.VRouter = "the agent is still starting"
		return d
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if err := a.vrouterDrops(ctx, since, &d); err != nil {
		d.VRouter = err.Error()
	}
	if counters, err := a.cni.Counters(); err == nil {
		for _, c := range counters {
			d.Counters = append(d.Counters, api.Counter{By: "kernel", Reason: c.Name, Packets: c.Packets, Bytes: c.Bytes})
		}
	}
	d.Flows = append(d.Flows, a.spoofedFlows()...)
	d.Counters = append(d.Counters, ipLayerDrops()...)
	d.Counters = slices.DeleteFunc(d.Counters, func(c api.Counter) bool { return c.Packets == 0 })
	return d
}

// spoofedFlows are the packets that the anti-spoofing rules dropped, with the pods that have sent them.
func (a *Agent) spoofedFlows() []api.DropFlow {
	all, err := a.cni.Spoofers()
	if err != nil {
		a.log.Debug("drops", "err", err) // their sum is there
		return nil
	}
	pods := map[string]netip.Addr{}
	for _, at := range a.cni.Attachments() {
		pods[at.HostName] = at.Address
	}
	var out []api.DropFlow
	for _, s := range all {
		out = append(out, api.DropFlow{By: "kernel", Reason: "spoofed", Pod: pods[s.Iface], Source: s.Source, Destination: s.Destination,
			Packets: s.Packets, Bytes: s.Bytes})
	}
	return out
}

func (a *Agent) vrouterDrops(ctx context.Context, since uint64, d *api.Drops) error {
	counters, err := a.plane.client.Counters(ctx)
	if err != nil {
		return err
	}
	for _, c := range counters {
		if reason, ok := strings.CutPrefix(c.Name, "drop_"); ok {
			d.Counters = append(d.Counters, api.Counter{By: "vrouter", Reason: reason, Packets: c.Packets, Bytes: c.Bytes})
		} else if strings.HasPrefix(c.Name, "kernel_") {
			d.Counters = append(d.Counters, api.Counter{By: "kernel", Reason: strings.TrimPrefix(c.Name, "kernel_"), Packets: c.Packets})
		}
	}
	flows, samples, err := a.plane.client.Drops(ctx, since)
	if err != nil {
		return err
	}
	for _, f := range flows {
		d.Flows = append(d.Flows, api.DropFlow{Reason: f.Reason, Source: f.Source, Destination: f.Destination, Packets: f.Packets, Bytes: f.Bytes})
	}
	for _, s := range samples {
		d.Samples = append(d.Samples, api.DropSample(s))
	}
	return nil
}

// ipLosses are the counters of the kernel's IP layer that count what it dropped on the way, with the names that drops has for
// them: /proc/net/snmp and netstat, which hold those of the agent's own network namespace, the node's.
var ipLosses = map[string]string{
	"Ip.InHdrErrors":             "ip_header_or_ttl",
	"Ip.InAddrErrors":            "ip_address_or_forwarding",
	"Ip.OutNoRoutes":             "ip_no_route",
	"IpExt.InNoRoutes":           "ip_no_route_in",
	"Ip.FragFails":               "ip_too_big",
	"Ip.InDiscards":              "ip_in_discarded",
	"Ip.OutDiscards":             "ip_out_discarded",
	"Ip.ReasmFails":              "ip_reassembly",
	"TcpExt.IPReversePathFilter": "ip_reverse_path_filter",
}

func ipLayerDrops() []api.Counter {
	var out []api.Counter
	for _, file := range []string{"/proc/thread-self/net/snmp", "/proc/thread-self/net/netstat"} {
		f, err := os.Open(file)
		if err != nil {
			continue
		}
		defer f.Close()
		// Lines come in pairs: "Ip: NAME NAME …" and "Ip: VALUE VALUE …".
		var names []string
		for lines := bufio.NewScanner(f); lines.Scan(); {
			fields := strings.Fields(lines.Text())
			if names == nil {
				names = fields
				continue
			}
			for i := 1; i < min(len(names), len(fields)); i++ {
				reason, wanted := ipLosses[strings.TrimSuffix(names[0], ":")+"."+names[i]]
				if n, err := strconv.ParseUint(fields[i], 10, 64); wanted && err == nil {
					out = append(out, api.Counter{By: "kernel", Reason: reason, Packets: n})
				}
			}
			names = nil
		}
	}
	return out
}

func captureOptions(filter string, outer bool, snap int) rpc.CaptureOptions {
	return rpc.CaptureOptions{Filter: filter, Outer: outer, SnapLen: snap}
}

// captureWriter writes what is captured as lines of JSON.
type captureWriter struct {
	w     http.ResponseWriter
	flush *http.ResponseController
	enc   *json.Encoder
	began bool
	lost  uint64
}

func (c *captureWriter) write(packets []rpc.CapturedPacket, lost uint64) error {
	if !c.began {
		c.began = true
		c.w.Header().Set("Content-Type", "application/x-ndjson")
	}
	if len(packets) == 0 || lost != c.lost {
		c.lost = lost
		if err := c.enc.Encode(api.Captured{Lost: lost}); err != nil {
			return err
		}
	}
	for _, p := range packets {
		if err := c.enc.Encode(api.Captured{Time: p.Time, Port: p.Port, Direction: p.Direction, Forwarded: p.Forwarded, Reason: p.Reason,
			Gateway: p.Gateway, Sent: p.Sent, Length: p.Length, Packet: p.Packet, SegmentSize: p.SegmentSize, PartialSum: p.PartialSum}); err != nil {
			return err
		}
	}
	return c.flush.Flush()
}
