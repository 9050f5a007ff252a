package port

import (
	"errors"
	"fmt"

	"margay/vrouter"
)

// The attachments: how packets of pods come to the vRouter.
const (
	// AttachAuto is AttachTUN, or AttachTUNPlain where the kernel lacks something.
	AttachAuto = "auto"
	// AttachTUN is a TUN device with offloads, and an underlay that carries superpackets on.
	AttachTUN = "tun"
	// AttachTUNPlain is a TUN device that hands over finished packets one by one, and a raw socket to send them.
	AttachTUNPlain = "tun-plain"
	// AttachDirect is AttachTUN and the host's side of each pod's interface.
	AttachDirect = "direct"
)

// Ports are the two ports of a vRouter, and why these.
type Ports struct {
	TUN      *TUN
	Underlay *Underlay
	Direct   *Direct // nil unless Attach is AttachDirect; it has the other two
	Attach   string  // AttachTUN, AttachTUNPlain or AttachDirect
	Why      string  // why it was chosen
}

// CheckAttach returns an error for a word that is no attachment.
func CheckAttach(attach string) error {
	switch attach {
	case AttachAuto, AttachTUN, AttachTUNPlain, AttachDirect:
		return nil
	}
	return fmt.Errorf("--attach %q: expected %s, %s, %s or %s", attach, AttachAuto, AttachTUN, AttachTUNPlain, AttachDirect)
}

// CheckIO returns an error for a word that is no way to read interfaces.
func CheckIO(io string) error {
	if io != IOPacket && io != IOXDP {
		return fmt.Errorf("--io %q: expected %s or %s", io, IOPacket, IOXDP)
	}
	return nil
}

// OpenPorts opens the ports of an attachment on the TUN device name. io, IOPacket or IOXDP, says how pods' interfaces are
// read. before is called between the underlay, which can
// be refused without a trace, and the device, which stays behind; its error ends the attempt.
func OpenPorts(attach, io, name string, before func() error) (*Ports, error) {
	return openPorts(attach, io, name, before, OpenOffloadUnderlay, OpenOffloadTUN)
}

func openPorts(attach, io, name string, before func() error, offloadUnderlay func() (*Underlay, error),
	offloadTUN func(string) (*TUN, error)) (*Ports, error) {
	if err := CheckAttach(attach); err != nil {
		return nil, err
	}
	if attach == AttachDirect {
		return openDirectPorts(io, name, before, offloadUnderlay, offloadTUN)
	}
	underlay, chosen, why, err := chooseUnderlay(attach, offloadUnderlay)
	if err != nil {
		return nil, err
	}
	if err := before(); err != nil {
		return nil, errors.Join(err, underlay.Close())
	}
	if chosen == AttachTUN {
		tun, err := offloadTUN(name)
		if err == nil {
			return &Ports{TUN: tun, Underlay: underlay, Attach: chosen, Why: why}, nil
		}
		// What closing says does not matter: the sockets are gone.
		_ = underlay.Close()
		if attach == AttachTUN {
			return nil, err
		}
		// What hinders the plain device too is its error then, and the one to tell.
		chosen, why = AttachTUNPlain, fmt.Sprintf("auto: %v", err)
		if underlay, err = OpenUnderlay(); err != nil {
			return nil, err
		}
	}
	tun, err := OpenTUN(name)
	if err != nil {
		return nil, errors.Join(err, underlay.Close())
	}
	return &Ports{TUN: tun, Underlay: underlay, Attach: chosen, Why: why}, nil
}

// openDirectPorts opens those of AttachTUN, and a Direct on top of them.
func openDirectPorts(io, name string, before func() error, offloadUnderlay func() (*Underlay, error),
	offloadTUN func(string) (*TUN, error)) (*Ports, error) {
	// What direct needs beside them is asked for first: it can be refused without a trace.
	s, err := newSteering(io)
	if err != nil {
		return nil, err
	}
	if err := s.close(); err != nil {
		return nil, err
	}
	p, err := openPorts(AttachTUN, io, name, before, offloadUnderlay, offloadTUN)
	if err != nil {
		return nil, err
	}
	p.Attach = AttachDirect
	if p.Direct, err = OpenDirect(p.TUN, p.Underlay, io); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// chooseUnderlay opens the underlay of an attachment.
func chooseUnderlay(attach string, offload func() (*Underlay, error)) (_ *Underlay, chosen, why string, err error) {
	if attach == AttachTUNPlain {
		underlay, err := OpenUnderlay()
		return underlay, AttachTUNPlain, "asked for", err
	}
	underlay, err := offload()
	if err == nil {
		if attach == AttachTUN {
			return underlay, AttachTUN, "asked for", nil
		}
		return underlay, AttachTUN, "auto: this kernel has what it needs", nil
	}
	if attach == AttachTUN {
		return nil, "", "", err
	}
	why = fmt.Sprintf("auto: %v", err)
	underlay, err = OpenUnderlay()
	return underlay, AttachTUNPlain, why, err
}

// String describes the ports for people: what was chosen, and why.
func (p *Ports) String() string {
	text := fmt.Sprintf("%s by %s (%s), offloads %s; underlay %s", p.TUN.Name(), p.Attach, p.Why, p.TUN.Offloads(), p.Underlay)
	if p.Direct != nil {
		text += "; " + p.Direct.String()
	}
	return text
}

// Stop ends the ports' Recv.
func (p *Ports) Stop() {
	if p.Direct != nil {
		p.Direct.Stop()
		return
	}
	p.TUN.Stop()
	p.Underlay.Stop()
}

// Close frees the ports. The device stays.
func (p *Ports) Close() error {
	if p.Direct != nil {
		return p.Direct.Close()
	}
	return errors.Join(p.TUN.Close(), p.Underlay.Close())
}

// Workers gives router the workers of these ports, and tells the ports what they need to know of it. It comes before the
// router is told anything.
func (p *Ports) Workers(router *vrouter.Router) []*vrouter.Worker {
	if p.Direct != nil {
		router.OnPods(p.Direct.SetPods)
		router.OnRoutes(p.Direct.SetRoutes)
		return []*vrouter.Worker{router.NewSwitch(p.Direct)}
	}
	return []*vrouter.Worker{
		router.NewWorker(vrouter.Encap, p.TUN, p.Underlay),
		router.NewWorker(vrouter.Decap, p.Underlay, p.TUN),
	}
}
