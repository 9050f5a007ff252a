package port

import (
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"margay/vrouter"
)

// reader is what a Direct needs of the ports that it has beside the pods': it waits for them all at once.
type reader interface {
	vrouter.Port
	// readFD is the descriptor that is readable when recvReady has something.
	readFD() int
	// recvReady is Recv without waiting: it returns how many packets there were, maybe none.
	recvReady(batch []*vrouter.Packet) int
	// tend is what an idle Recv does from time to time, on any goroutine.
	tend()
}

// Direct is the port of the attachment `direct`: the host's interface vr0, the underlay, and the host's side of each pod's
// interface. What the kernel is to handle, of what pods send, never comes here: see steering. It implements
// vrouter.SwitchPort.
//
// Of several queues each is a Direct of its own, on one queue of the host's port and one of the underlay's, and among them the
// pods' interfaces are shared out in turn. The first has what is the port's as a whole.
//
// Pods come and go by way of a directPods, which has a goroutine of its own. It hands over whole tables; the goroutine of
// Recv takes the next one when it comes by, so that numbers of interfaces mean the same from Recv to Send.
type Direct struct {
	lead   *Direct   // the first queue; nil: this is it
	more   []*Direct // of the first queue: the others
	number int       // of the queue, from 0

	host     reader
	underlay reader
	pods     *directPods

	epoll   int
	wake    int // eventfd: there is another table, or stopped
	stopped atomic.Bool
	spinner spinner
	next    atomic.Pointer[directTable]
	taken   atomic.Uint64 // the generation of the table that Recv has taken

	// For the goroutine of Recv and Send only.
	table      *directTable
	events     [directEvents]unix.EpollEvent
	ready      int // events that wait from here …
	end        int // … to here
	toHost     []*vrouter.Packet
	toUnderlay []*vrouter.Packet
	receiver   packetReader
	sender     podSender
}

// directTable is the pods' interfaces at one time; immutable.
type directTable struct {
	generation uint64
	pods       *vrouter.Pods
	links      []*podLink // of interface vrouter.FirstPodInterface and on; nil: none
}

const (
	// directEvents is the number of interfaces that one look takes in; others that are ready come with the next one.
	directEvents = 64
	// wakeEvent is what the wake descriptor is known by; the others have their interface's number.
	wakeEvent = -1
)

// OpenDirect opens the port on top of the host's and the underlay's, which it takes over. io is one of the IO constants. Pods
// follow by SetPods.
func OpenDirect(host Device, underlay *Underlay, io string) (*Direct, error) {
	d, err := openDirect(host, underlay, io)
	if err == nil && underlay.bypass != nil {
		d.pods.frames = underlay.bypass.options.frames() // of the pods' sockets: there is none before SetPods
	}
	return d, err
}

func openDirect(host Device, underlay *Underlay, io string) (_ *Direct, err error) {
	none := &directTable{pods: vrouter.NewPods(nil, nil)}
	var d *Direct
	below := underlay.queues()
	for i, above := range host.queues() {
		q := &Direct{lead: d, number: i, host: above, underlay: below[i], epoll: -1, wake: -1, table: none}
		q.sender.writer.fd, q.sender.queue = -1, i
		q.next.Store(none)
		if i == 0 {
			d = q
		} else {
			d.more = append(d.more, q)
		}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.free())
		}
	}()
	for _, q := range d.all() {
		if err := q.open(); err != nil {
			return nil, err
		}
	}
	if d.pods, err = newDirectPods(d, underlay, io); err != nil {
		return nil, err
	}
	for _, q := range d.more {
		q.pods = d.pods
	}
	return d, nil
}

// all returns the queues, this one first.
func (d *Direct) all() []*Direct { return append([]*Direct{d}, d.more...) }

// reads returns the queue that reads the pod's interface at a place in the table, and sends by it if it is read by AF_XDP.
func (d *Direct) reads(slot int) *Direct { return d.all()[slot%(len(d.more)+1)] }

// open opens what each queue has.
func (d *Direct) open() (err error) {
	if d.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return err
	}
	if d.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return err
	}
	if err := d.listen(d.wake, wakeEvent); err != nil {
		return err
	}
	d.relisten()
	return d.sender.open()
}

// listen makes Recv look at fd, under the number event.
func (d *Direct) listen(fd int, event int32) error {
	if err := unix.EpollCtl(d.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: event}); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	return nil
}

// relisten looks after the descriptors that the ports below us replace when their interface goes and comes back: the
// number stays, and the kernel forgets that we listen to it.
func (d *Direct) relisten() {
	// Most of the time the answer is EEXIST; any other is tried again soon.
	_ = d.listen(d.host.readFD(), int32(vrouter.HostInterface))
	_ = d.listen(d.underlay.readFD(), int32(vrouter.UnderlayInterface))
}

// poke makes Recv look at next and stopped.
func (d *Direct) poke() {
	// The counter cannot overflow: Recv reads it. A failed write is impossible on a valid eventfd.
	_, _ = unix.Write(d.wake, []byte{1, 0, 0, 0, 0, 0, 0, 1})
}

// SetPods tells the port of all pods, as vrouter.Router.OnPods does. Their interfaces are taken when they are there and the
// pod answers at them.
func (d *Direct) SetPods(pods []vrouter.Pod) { d.pods.set(pods) }

// Name implements vrouter.Port.
func (d *Direct) Name() string { return "direct" }

// String describes the pods' interfaces for people.
func (d *Direct) String() string { return d.pods.String() }

// Pods implements vrouter.SwitchPort.
func (d *Direct) Pods() *vrouter.Pods { return d.table.pods }

// Rewritten returns the flows that the kernel rewrote when the port was opened, for vrouter.Router.NewSwitch.
func (d *Direct) Rewritten() []vrouter.Flow { return d.pods.rewritten }

// Recv implements vrouter.Port.
func (d *Direct) Recv(batch []*vrouter.Packet) (int, error) {
	empty := false // the last look has found nothing
	for {
		if d.stopped.Load() {
			return 0, vrouter.ErrStopped
		}
		if next := d.next.Load(); next != d.table {
			d.table = next
			d.taken.Store(next.generation)
			d.pods.poke() // what the table before had and this one has not can be closed
		}
		if n := d.recv(batch); n > 0 {
			d.spinner.found(n)
			return n, nil
		}
		// The first look costs a system call, and those of a wait a look aside besides.
		timeout := 0
		if empty && !d.spinner.again() {
			timeout = -1
		}
		n, err := unix.EpollWait(d.epoll, d.events[:], timeout)
		if err != nil && err != unix.EINTR {
			return 0, fmt.Errorf("epoll: %w", err)
		}
		d.ready, d.end = 0, max(n, 0)
		empty = d.end == 0
	}
}

// recv takes what the interfaces have that the last look has found ready, each as much as fits.
func (d *Direct) recv(batch []*vrouter.Packet) int {
	n := 0
	for d.ready < d.end && n < len(batch) {
		event := d.events[d.ready].Fd
		d.ready++
		switch event {
		case wakeEvent:
			var b [8]byte
			_, _ = unix.Read(d.wake, b[:])
		case int32(vrouter.HostInterface):
			got := d.host.recvReady(batch[n:])
			if got == 0 {
				d.relisten() // maybe the device was made anew
			}
			n += got
		case int32(vrouter.UnderlayInterface):
			got := d.underlay.recvReady(batch[n:])
			for _, p := range batch[n : n+got] {
				p.In = vrouter.UnderlayInterface
			}
			n += got
		default:
			// It may have gone since the look.
			at := vrouter.Interface(event)
			if l := d.table.link(at); l != nil {
				got := l.recv(&d.receiver, batch[n:])
				for _, p := range batch[n : n+got] {
					p.In = at
				}
				n += got
			}
		}
	}
	return n
}

// link returns a pod's interface, or nil.
func (t *directTable) link(at vrouter.Interface) *podLink {
	if i := int(at) - int(vrouter.FirstPodInterface); i >= 0 && i < len(t.links) {
		return t.links[i]
	}
	return nil
}

// Send implements vrouter.Port.
func (d *Direct) Send(batch []*vrouter.Packet) {
	d.toHost, d.toUnderlay = d.toHost[:0], d.toUnderlay[:0]
	for i, p := range batch {
		switch p.Out {
		case vrouter.HostInterface:
			d.toHost = append(d.toHost, p)
		case vrouter.UnderlayInterface:
			d.toUnderlay = append(d.toUnderlay, p)
		default:
			l := d.table.link(p.Out)
			if l == nil {
				p.Sent, p.Drop = 0, vrouter.ReasonNoPod
				continue
			}
			d.sender.send(l, batch[i:i+1])
		}
	}
	d.sender.flush()
	if len(d.toHost) > 0 {
		d.host.Send(d.toHost)
	}
	if len(d.toUnderlay) > 0 {
		d.underlay.Send(d.toUnderlay)
	}
}

// follow names the router, of which a shortcut has to know more than SetPods and SetRoutes tell.
func (d *Direct) follow(r *vrouter.Router) {
	if d.pods.plan != nil {
		d.pods.plan.follow(r)
	}
}

// Carried implements vrouter.Programs.
func (d *Direct) Carried() vrouter.Carried {
	if d.lead != nil || d.pods.plan == nil { // the first queue tells of all
		return vrouter.Carried{}
	}
	c, _ := d.pods.plan.carried()
	return c
}

// Counters implements vrouter.Port: those of the host's and the underlay's, and the pods'. The first queue tells of all.
func (d *Direct) Counters() []vrouter.Counter {
	if d.lead != nil {
		return nil
	}
	all := append(d.host.Counters(), d.underlay.Counters()...)
	all = append(all, vrouter.Counter{Name: "kernel_pods_rx_dropped", Packets: d.pods.dropped()}) // a socket's buffer was full
	if d.pods.plan != nil {
		_, failed := d.pods.plan.carried()
		all = append(all, vrouter.Counter{Name: "kernel_tc_dropped", Packets: failed.Packets}) // the kernel had no memory
	}
	return all
}

// Stop implements vrouter.Port, for all queues.
func (d *Direct) Stop() {
	for _, q := range d.all() {
		q.stopped.Store(true)
		q.poke()
	}
	d.host.Stop()
	d.underlay.Stop()
}

// Close implements vrouter.Port, for all queues. It closes the host's and the underlay's ports too.
func (d *Direct) Close() error { return errors.Join(d.free(), d.host.Close(), d.underlay.Close()) }

func (d *Direct) free() error {
	var errs []error
	if d.pods != nil {
		errs = append(errs, d.pods.close())
	}
	for _, q := range d.all() {
		for _, fd := range []int{q.epoll, q.wake, q.sender.writer.fd} {
			if fd >= 0 {
				errs = append(errs, unix.Close(fd))
			}
		}
	}
	return errors.Join(errs...)
}
