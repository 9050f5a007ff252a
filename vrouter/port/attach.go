package port

import (
	"errors"
	"fmt"
)

// The attachments: how packets of pods come to the vRouter.
const (
	// AttachAuto is AttachTUN, or AttachTUNPlain where the kernel lacks something.
	AttachAuto = "auto"
	// AttachTUN is a TUN device with offloads, and an underlay that carries superpackets on.
	AttachTUN = "tun"
	// AttachTUNPlain is a TUN device that hands over finished packets one by one, and a raw socket to send them.
	AttachTUNPlain = "tun-plain"
)

// Ports are the two ports of a vRouter, and why these.
type Ports struct {
	TUN      *TUN
	Underlay *Underlay
	Attach   string // AttachTUN or AttachTUNPlain
	Why      string // why it was chosen
}

// CheckAttach returns an error for a word that is no attachment.
func CheckAttach(attach string) error {
	switch attach {
	case AttachAuto, AttachTUN, AttachTUNPlain:
		return nil
	}
	return fmt.Errorf("--attach %q: expected %s, %s or %s", attach, AttachAuto, AttachTUN, AttachTUNPlain)
}

// OpenPorts opens the ports of an attachment on the TUN device name. before is called between the underlay, which can
// be refused without a trace, and the device, which stays behind; its error ends the attempt.
func OpenPorts(attach, name string, before func() error) (*Ports, error) {
	return openPorts(attach, name, before, OpenOffloadUnderlay, OpenOffloadTUN)
}

func openPorts(attach, name string, before func() error, offloadUnderlay func() (*Underlay, error),
	offloadTUN func(string) (*TUN, error)) (*Ports, error) {
	if err := CheckAttach(attach); err != nil {
		return nil, err
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
	return fmt.Sprintf("%s by %s (%s), offloads %s; underlay %s", p.TUN.Name(), p.Attach, p.Why, p.TUN.Offloads(), p.Underlay)
}

// Stop ends the ports' Recv.
func (p *Ports) Stop() {
	p.TUN.Stop()
	p.Underlay.Stop()
}

// Close frees the ports. The device stays.
func (p *Ports) Close() error { return errors.Join(p.TUN.Close(), p.Underlay.Close()) }
