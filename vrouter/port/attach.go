package port

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"margay/vrouter"
)

// The attachments: how packets of pods come to the vRouter.
const (
	// AttachAuto is the best of the others that keeps the kernel's part in services (kube-proxy) as it is, and that this
	// kernel can carry: AttachVeth, else AttachTUN, else AttachTUNPlain.
	AttachAuto = "auto"
	// AttachTUN is a TUN device with offloads, and an underlay that carries superpackets on.
	AttachTUN = "tun"
	// AttachTUNPlain is a TUN device that hands over finished packets one by one, and a raw socket to send them.
	AttachTUNPlain = "tun-plain"
	// AttachVeth is a veth pair, one end for the kernel and one for us, and the underlay of AttachTUN.
	AttachVeth = "veth"
	// AttachDirect is AttachTUN and the host's side of each pod's interface.
	AttachDirect = "direct"
)

// The ways to read and write Ethernet interfaces: the underlay, the twin of AttachVeth, the pods' of AttachDirect.
const (
	// IOPacket is AF_PACKET: superpackets pass whole.
	IOPacket = "packet"
	// IOXDP is AF_XDP: the least work for each packet, but on a veth the kernel splits superpackets on their way to us.
	IOXDP = "xdp"
	// IOTC is IOPacket for AttachDirect, with programs in the kernel that forward themselves what they know the way of.
	IOTC = "tc"
)

var (
	attachments = []string{AttachAuto, AttachTUN, AttachTUNPlain, AttachVeth, AttachDirect}
	ios         = []string{IOPacket, IOXDP, IOTC}
)

// Options say what ports to open.
type Options struct {
	Attach string
	IO     string
	Name   string // of vr0
	// BusyPoll is how many microseconds AF_XDP sockets look for packets at the device; 0: interrupts bring them.
	BusyPoll int
	// Frames is how many packets each AF_XDP socket holds that wait for us, a power of two; 0: DefaultFrames.
	Frames int
	// Queues is how many queues vr0 and the underlay have, a worker each; 0: DefaultQueues.
	Queues int
	// Threads is how many threads a queue has: 2, one for each direction, or 1 for both; 0: DefaultThreads. AttachDirect
	// has one for both.
	Threads int
	// Spin is how many microseconds a worker looks for packets before it sleeps, while they come that often; 0: it
	// sleeps at once.
	Spin int
}

// DefaultSpin is what Options.Spin is unless somebody says otherwise: longer than a packet takes from node to node and
// back.
const DefaultSpin = 200

// maxQueues is the number of queues at most: as many as a TUN device can have, and the sockets of a fanout group.
const maxQueues = 256

// DefaultThreads is what Options.Threads is unless somebody says otherwise. On two processors two threads and the pods are in
// each other's way, and one that is at work need not be woken: docs/ports.md has the figures.
func DefaultThreads() int {
	if runtime.NumCPU() <= 2 {
		return 1
	}
	return 2
}

// DefaultQueues is what Options.Queues is unless somebody says otherwise: on a machine of eight processors or more as many
// as leave half of them to the pods when the workers of both directions have all that they can use, up to eight, and one on
// a smaller machine, where the processors are busy with what the pods do.
func DefaultQueues() int { return min(max(runtime.NumCPU()/4, 1), 8) }

// Check returns an error that names the option that is wrong, and what was expected.
func (o Options) Check() error {
	if !slices.Contains(attachments, o.Attach) {
		return fmt.Errorf("--attach %q: expected one of %s", o.Attach, strings.Join(attachments, ", "))
	}
	if !slices.Contains(ios, o.IO) {
		return fmt.Errorf("--io %q: expected one of %s", o.IO, strings.Join(ios, ", "))
	}
	if o.IO == IOXDP && o.Attach == AttachTUNPlain {
		return fmt.Errorf("--io %s: not with --attach %s, which has raw sockets: expected another attachment", o.IO, o.Attach)
	}
	if o.IO == IOTC && o.Attach != AttachDirect {
		return fmt.Errorf("--io %s: not with --attach %s: expected --attach %s", o.IO, o.Attach, AttachDirect)
	}
	if n := len(o.Name); n == 0 || n > 15 || strings.ContainsAny(o.Name, "/% \t\n") {
		return fmt.Errorf("--tun %q: expected an interface name of 1 to 15 characters", o.Name)
	}
	if o.BusyPoll < 0 || o.BusyPoll > maxBusyPoll {
		return fmt.Errorf("--busy-poll %d: expected 0 to %d microseconds", o.BusyPoll, maxBusyPoll)
	}
	if o.BusyPoll > 0 && o.IO != IOXDP {
		return fmt.Errorf("--busy-poll %d: it is for --io %s: expected that, or 0", o.BusyPoll, IOXDP)
	}
	if o.Frames != 0 && (o.Frames < minFrames || o.Frames > maxFrames || o.Frames&(o.Frames-1) != 0) {
		return fmt.Errorf("--xdp-frames %d: expected a power of two from %d to %d", o.Frames, minFrames, maxFrames)
	}
	if o.Queues < 0 || o.Queues > maxQueues {
		return fmt.Errorf("--queues %d: expected 1 to %d, or 0 for what suits the processors", o.Queues, maxQueues)
	}
	if o.Threads < 0 || o.Threads > 2 {
		return fmt.Errorf("--threads-per-queue %d: expected 1 or 2, or 0 for what suits the processors", o.Threads)
	}
	if o.Spin < 0 || o.Spin > maxBusyPoll {
		return fmt.Errorf("--spin %d: expected 0 to %d microseconds", o.Spin, maxBusyPoll)
	}
	return nil
}

// maxBusyPoll is a second, in microseconds.
const maxBusyPoll = 1_000_000

// Ports are the ports of a vRouter, and why these.
type Ports struct {
	Device   Device
	Underlay *Underlay
	Direct   *Direct // nil unless Attach is AttachDirect; it has the other two
	Attach   string  // what AttachAuto became
	IO       string
	Queues   int    // of the device and of the underlay
	Why      string // why it was chosen

	joints []*joint // of each queue, where one thread has both directions
}

// xdp returns what concerns AF_XDP.
func (o Options) xdp() XDPOptions { return XDPOptions{BusyPoll: o.BusyPoll, Frames: o.Frames} }

// openers open the drivers; tests put others in.
type openers struct {
	underlay func() (*Underlay, error) // one that carries superpackets on
	device   func(name string) (Device, error)
}

// openersOf returns those of an attachment other than AttachTUNPlain.
func openersOf(o Options) openers {
	open := openers{
		underlay: func() (*Underlay, error) { return openOffloadUnderlay(o.Queues, newRetag) },
		device: func(name string) (Device, error) {
			return deviceOf(newTUN(tunOptions{name: name, queues: o.Queues, offloads: true, steered: o.IO == IOXDP}).start())
		},
	}
	if o.IO == IOXDP {
		open.underlay = func() (*Underlay, error) { return openXDPUnderlay(o.Queues, o.xdp(), newRetag) }
	}
	switch {
	case o.Attach == AttachVeth && o.IO == IOXDP:
		open.device = func(name string) (Device, error) { return deviceOf(openXDPVeth(name, o.Queues, o.xdp())) }
	case o.Attach == AttachVeth:
		open.device = func(name string) (Device, error) { return deviceOf(openVeth(name, o.Queues, nil)) }
	}
	return open
}

// deviceOf makes no Device of a nil pointer.
func deviceOf[D interface {
	*TUN | *Veth
	Device
}](d D, err error) (Device, error) {
	if err != nil {
		return nil, err
	}
	return d, nil
}

// OpenPorts opens ports. before is called between the underlay, which can be refused without a trace, and the device,
// which stays behind; its error ends the attempt.
func OpenPorts(o Options, before func() error) (*Ports, error) {
	if o.Queues == 0 {
		o.Queues = DefaultQueues()
	}
	p, err := openPorts(o, before, openersOf)
	if err != nil {
		return nil, err
	}
	p.Queues = o.Queues
	if o.Threads == 0 {
		o.Threads = DefaultThreads()
	}
	if o.Threads == 1 && p.Direct == nil {
		if err := p.join(); err != nil {
			return nil, errors.Join(err, p.Close())
		}
	}
	p.spin(time.Duration(o.Spin) * time.Microsecond)
	return p, nil
}

func openPorts(o Options, before func() error, openersOf func(Options) openers) (*Ports, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	switch o.Attach {
	case AttachTUNPlain:
		return openPlain(o, before, "asked for")
	case AttachAuto:
		return openAuto(o, before, openersOf)
	}
	return openOffload(o, before, openersOf(o), "asked for")
}

// openOffload opens the ports of an attachment that carries superpackets.
func openOffload(o Options, before func() error, open openers, why string) (*Ports, error) {
	if o.Attach == AttachDirect {
		// What direct needs beside the others is asked for first: it can be refused without a trace.
		s, err := newSteering(o.IO)
		if err != nil {
			return nil, err
		}
		if err := s.close(); err != nil {
			return nil, err
		}
	}
	p := &Ports{Attach: o.Attach, IO: o.IO, Why: why}
	var err error
	if p.Underlay, err = open.underlay(); err != nil {
		return nil, err
	}
	if err := before(); err != nil {
		return nil, errors.Join(err, p.Underlay.Close())
	}
	if p.Device, err = open.device(o.Name); err != nil {
		return nil, errors.Join(err, p.Underlay.Close())
	}
	if o.Attach == AttachDirect {
		if p.Direct, err = OpenDirect(p.Device, p.Underlay, o.IO); err != nil {
			return nil, errors.Join(err, p.Close())
		}
	}
	return p, nil
}

// openPlain opens the ports that need the least.
func openPlain(o Options, before func() error, why string) (*Ports, error) {
	queues := max(o.Queues, 1)
	underlay, err := openUnderlay(queues)
	if err != nil {
		return nil, err
	}
	if err := before(); err != nil {
		return nil, errors.Join(err, underlay.Close())
	}
	tun, err := newTUN(tunOptions{name: o.Name, queues: queues}).start()
	if err != nil {
		return nil, errors.Join(err, underlay.Close())
	}
	return &Ports{Device: tun, Underlay: underlay, Attach: AttachTUNPlain, IO: IOPacket, Why: why}, nil
}

// openAuto opens the best ports that the kernel lets us have, and says what kept it from better ones. What hinders the last
// ones too is the error, and the one to tell. I/O by AF_XDP has to be asked for, and what was asked for is not replaced. Nor
// is there another attachment to try while somebody else has the device: it may be a vRouter on its way out, whose device
// the next attempt would then replace.
func openAuto(o Options, before func() error, openersOf func(Options) openers) (*Ports, error) {
	var beforeErr error
	did := false
	once := func() error {
		if !did {
			did, beforeErr = true, before()
		}
		return beforeErr
	}
	why := "this kernel has what it needs"
	for _, attach := range []string{AttachVeth, AttachTUN} {
		o.Attach = attach
		p, err := openOffload(o, once, openersOf(o), "auto: "+why)
		if err == nil || beforeErr != nil || errors.Is(err, unix.EBUSY) || o.IO == IOXDP && attach == AttachTUN {
			return p, err
		}
		why = "not " + attach + ": " + err.Error()
	}
	return openPlain(o, once, "auto: "+why)
}

// spin says how long to look for packets before sleeping.
func (p *Ports) spin(longest time.Duration) {
	if p.Direct != nil {
		for _, q := range p.Direct.all() {
			q.spinner.longest = longest
		}
		return
	}
	p.Device.spin(longest)
	p.Underlay.spin(longest)
	for _, j := range p.joints {
		j.longest = longest
	}
}

// String describes the ports for people: what was chosen, and why.
func (p *Ports) String() string {
	text := fmt.Sprintf("%s by %s, %s (%s), offloads %s; underlay %s", p.Device.Name(), p.Attach, p.IO, p.Why, p.Device.Offloads(), p.Underlay)
	if p.Queues > 1 {
		text += fmt.Sprintf("; %d queues", p.Queues)
	}
	if p.joints != nil {
		text += "; one thread for both directions"
	}
	if p.Direct != nil {
		text += "; " + p.Direct.String()
	}
	return text
}

// Configure brings the ports in line with a configuration.
func (p *Ports) Configure(c vrouter.Config) error {
	return errors.Join(p.Underlay.SetInterface(c.Underlay), p.Underlay.SetNode(c.NodeAddress), p.Device.SetMTU(c.MTU))
}

// Stop ends the ports' Recv.
func (p *Ports) Stop() {
	if p.Direct != nil {
		p.Direct.Stop()
		return
	}
	p.Device.Stop()
	p.Underlay.Stop()
	for _, j := range p.joints {
		j.stop()
	}
}

// Close frees the ports. The device stays.
func (p *Ports) Close() error {
	if p.Direct != nil {
		return p.Direct.Close()
	}
	errs := []error{p.Device.Close(), p.Underlay.Close()}
	for _, j := range p.joints {
		errs = append(errs, j.close())
	}
	return errors.Join(errs...)
}

// Workers gives router the workers of these ports, and tells the ports what they need to know of it. It comes before the
// router is told anything.
func (p *Ports) Workers(router *vrouter.Router) []*vrouter.Worker {
	if p.Direct != nil {
		router.OnPods(p.Direct.SetPods)
		router.OnRoutes(p.Direct.SetRoutes)
		p.Direct.follow(router)
		var queues []vrouter.SwitchPort
		for _, q := range p.Direct.all() {
			queues = append(queues, q)
		}
		return router.NewSwitches(queues, p.Direct.Rewritten()...)
	}
	var workers []*vrouter.Worker
	device, underlay := p.Device.queues(), p.Underlay.queues()
	for i := range device {
		workers = append(workers,
			router.NewWorker(vrouter.Encap, device[i], underlay[i]),
			router.NewWorker(vrouter.Decap, underlay[i], device[i]))
	}
	return workers
}
