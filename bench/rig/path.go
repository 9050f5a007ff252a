package rig

import (
	"fmt"
	"slices"
	"strings"
)

// The kinds of path.
const (
	KindWire      = "wire"      // nothing: the generator's veth ends at the sink, which measures these two alone
	KindRoute     = "route"     // the kernel routes, no encapsulation
	KindVXLAN     = "vxlan"     // the kernel's VXLAN device, as flannel and Calico set it up
	KindWireGuard = "wireguard" // wireguard-go, which also encrypts
	KindVRouter   = "vrouter"   // ours
)

// attachments are the words for `vrouter --attach`.
var attachments = []string{"tun", "tun-plain", "veth", "direct", "auto"}

// Path is one way to carry packets, ours or a peer's.
type Path struct {
	Name   string // as written, also in the report
	Kind   string
	RPS    bool   // kernel paths: every processor works on what arrives at one device
	Attach string // vrouter: --attach
	IO     string // vrouter: --io, none for its default
	NoBPF  bool   // vrouter: with the capabilities NET_ADMIN and NET_RAW alone
	Binary string // vrouter: another binary than the run's own
}

// Shortcut tells whether the path's packets go past the vRouter, whose BPF programs carry them in the kernel.
func (p Path) Shortcut() bool { return p.IO == "tc" }

// ParsePath reads a path as it is named on the command line: wire, route, vxlan, wireguard or an attachment, then any of
// +rps, +xdp, +packet, +tc, +nobpf, and after @ the vrouter binary to take.
func ParsePath(text string) (Path, error) {
	p := Path{Name: text}
	rest, binary, found := strings.Cut(text, "@")
	if found && binary == "" {
		return p, fmt.Errorf("path %q: expected a vrouter binary after @", text)
	}
	p.Binary = binary
	words := strings.Split(rest, "+")
	switch base := words[0]; {
	case base == KindWire || base == KindRoute || base == KindVXLAN || base == KindWireGuard:
		p.Kind = base
	case slices.Contains(attachments, base):
		p.Kind, p.Attach = KindVRouter, base
	default:
		return p, fmt.Errorf("path %q: expected wire, route, vxlan, wireguard or an attachment (%s)", text, strings.Join(attachments, ", "))
	}
	ours, kernel := p.Kind == KindVRouter, p.Kind == KindRoute || p.Kind == KindVXLAN
	for _, w := range words[1:] {
		switch {
		case kernel && w == "rps":
			p.RPS = true
		case ours && (w == "xdp" || w == "packet" || w == "tc") && p.IO == "":
			p.IO = w
		case ours && w == "nobpf":
			p.NoBPF = true
		default:
			return p, fmt.Errorf("path %q: +%s: expected +rps with route and vxlan, +xdp, +packet, +tc or +nobpf with an attachment", text, w)
		}
	}
	if p.Binary != "" && !ours {
		return p, fmt.Errorf("path %q: @: expected an attachment before it", text)
	}
	return p, nil
}

// Label is the path's name in plain letters, for namespaces and files.
func (p Path) Label() string {
	name, _, _ := strings.Cut(p.Name, "@")
	return strings.ReplaceAll(name, "+", "-")
}
