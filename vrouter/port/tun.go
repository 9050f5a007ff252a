package port

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/songgao/water"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/vrouter"
	"margay/vrouter/packet"
)

const (
	tunPath = "/dev/net/tun"
	// tunQueue is the length of the kernel's queue toward us, in packets. The kernel's 500 overflow within the time
	// slice that another process may take from us.
	tunQueue = 2048
	// reopenDelay is the time between attempts to make a deleted device anew, in milliseconds.
	reopenDelay = 200
)

// TUN is a persistent TUN device. Opened by OpenTUN it has no offloads: the kernel hands every packet over finished and
// within the MTU, and superpackets toward it are split here. Opened by OpenOffloadTUN it carries superpackets and
// unfinished checksums in both directions. It implements vrouter.Port, of one queue of the device, see tunqueues.go.
type TUN struct {
	vr0
	open    func(name string) (int, error)
	held    int         // see holdDevice; -1: not the first queue
	multi   bool        // the device is one of several queues
	steered bool        // by a program
	lead    *TUN        // the first queue; nil: this is it
	more    []*TUN      // of the first queue: the others
	vnet    int         // length of the virtio-net header in front of each packet: vnetHeader, or 0 without offloads
	udp     atomic.Bool // the kernel splits UDP superpackets too
	fd      int         // the number stays the same for the life of the port, see reopen
	waiter  *waiter

	// For Send only.
	scratch []byte
	emit    func([]byte)
	written int
	failure vrouter.Reason
	run     run
	pieces  [joinMax]unix.Iovec
}

// OpenTUN creates the device name, or takes over the one that an earlier process left, and sets it up. It stays, with
// its addresses and routes, when the port is closed or the process dies.
func OpenTUN(name string) (*TUN, error) { return newTUN(tunOptions{name: name, queues: 1}).start() }

// start opens the device of a TUN that knows how.
func (t *TUN) start() (_ *TUN, err error) {
	name := t.name
	if t.held, err = holdDevice(name); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Close())
		}
	}()
	if err := removePair(name); err != nil {
		return nil, err
	}
	for _, q := range t.all() {
		if err := q.attach(); err != nil {
			return nil, err
		}
	}
	if err = t.vr0.open(); err == nil {
		err = t.setUp()
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return t, nil
}

// attach opens one queue, and replaces a device that an earlier process left with one queue where several are wanted, or
// the other way round: the kernel lets neither become the other.
func (t *TUN) attach() (err error) {
	t.fd, err = t.open(t.name)
	if errors.Is(err, unix.EINVAL) && removeTUN(t.name) == nil {
		t.fd, err = t.open(t.name)
	}
	if err != nil {
		return err
	}
	t.scratch = make([]byte, vrouter.BufferSize)
	if t.emit = t.write; t.vnet > 0 {
		t.emit = t.writeBehindHeader
	}
	if t.waiter, err = newWaiter(); err != nil {
		return fmt.Errorf("%s: %w", t.name, err)
	}
	return nil
}

// openPlain attaches to the device and returns a descriptor that only we use: not blocking, closed on exec, and out of
// the Go runtime's poller, which would be woken by each packet.
func (t *TUN) openPlain(name string) (int, error) {
	config := water.Config{DeviceType: water.TUN}
	config.Name = name
	config.Persist = true
	config.MultiQueue = t.multi
	device, err := water.New(config)
	if err != nil {
		return -1, explainTUN(name, err)
	}
	defer device.Close()
	file, ok := device.ReadWriteCloser.(*os.File)
	if !ok {
		return -1, fmt.Errorf("%s: the TUN library gave a %T: expected a file", name, device.ReadWriteCloser)
	}
	raw, err := file.SyscallConn()
	if err != nil {
		return -1, fmt.Errorf("%s: %w", name, err)
	}
	fd := -1
	var dupErr error
	if err := raw.Control(func(original uintptr) {
		fd, dupErr = unix.FcntlInt(original, unix.F_DUPFD_CLOEXEC, 0)
	}); err != nil {
		return -1, fmt.Errorf("%s: %w", name, err)
	}
	if dupErr != nil {
		return -1, fmt.Errorf("%s: %w", name, dupErr)
	}
	if err := withoutOffloads(fd); err != nil {
		return -1, errors.Join(fmt.Errorf("%s: %w", name, err), unix.Close(fd))
	}
	return fd, nil
}

func explainTUN(name string, err error) error {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return &Missing{What: "TUN device " + name, Err: fmt.Errorf("no %s: %w", tunPath, unwrapErrno(err)),
			Do: "load the driver (modprobe tun), give the container " + tunPath + ", or choose --attach veth"}
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return &Missing{What: "TUN device " + name, Err: unwrapErrno(err), Do: needPrivilege}
	case errors.Is(err, unix.EBUSY):
		return &Missing{What: "TUN device " + name, Err: unwrapErrno(err), Do: "another process, maybe another vrouter, has it open: stop that one, or choose another --tun"}
	case errors.Is(err, unix.EINVAL):
		return &Missing{What: "TUN device " + name, Err: unwrapErrno(err), Do: "an interface of that name and another kind is there: remove it, or choose another --tun"}
	}
	return fmt.Errorf("TUN device %s: %w", name, err)
}

// unwrapErrno leaves of an error only the kernel's part, so that one line stays short.
func unwrapErrno(err error) error {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}

// setUp gives the device its queue, MTU and longest superpacket, and takes it up.
func (t *TUN) setUp() error {
	return t.change(func(link netlink.Link) error {
		// The first change that needs a privilege where the device was there already.
		if err := t.links.LinkSetTxQLen(link, tunQueue); errors.Is(err, unix.EPERM) {
			return &Missing{What: "queue length of " + t.name, Err: unwrapErrno(err), Do: needPrivilege}
		} else if err != nil {
			return fmt.Errorf("set queue length: %w", err)
		}
		if err := t.steer(); err != nil {
			return err
		}
		return t.prepare(link, t.vnet > 0)
	})
}

// Recv implements vrouter.Port.
func (t *TUN) Recv(batch []*vrouter.Packet) (int, error) {
	for {
		if t.waiter.stopped.Load() {
			return 0, vrouter.ErrStopped
		}
		n, err := t.read(batch)
		if n > 0 {
			t.waiter.found(n)
			return n, nil
		}
		if err == unix.EBADFD { // the device was deleted under us
			t.reopen()
			continue
		}
		if t.waiter.again() {
			continue
		}
		t.waiter.wait(t.fd, unix.POLLIN, -1)
	}
}

// read takes what is there, without waiting; the error says why it is not more.
func (t *TUN) read(batch []*vrouter.Packet) (n int, err error) {
	for n < len(batch) {
		p := batch[n]
		var got int
		start := vrouter.Headroom - t.vnet
		if got, err = unix.Read(t.fd, p.Buf[start:]); err == unix.EINTR {
			continue
		} else if err != nil {
			break
		}
		p.Off, p.Len, p.Offload = vrouter.Headroom, max(got-t.vnet, 0), vrouter.Offload{}
		if t.vnet > 0 {
			p.Offload = parseVnet(p.Buf[start:vrouter.Headroom], 0)
		}
		n++
	}
	return n, err
}

// readFD implements reader.
func (t *TUN) readFD() int { return t.fd }

// recvReady implements reader. It makes a device anew that was deleted.
func (t *TUN) recvReady(batch []*vrouter.Packet) int {
	n, err := t.read(batch)
	if n == 0 && err == unix.EBADFD {
		t.reopen()
	}
	return n
}

// tend implements reader: there is nothing to do.
func (t *TUN) tend() {}

// reopen makes the device anew, trying until it works or the port is stopped. The new device takes over the number of
// the old descriptor, in one step, so that Send, on its own thread, needs no lock.
func (t *TUN) reopen() {
	t.retry(func() error {
		fd, err := t.open(t.name)
		if err != nil {
			return err
		}
		return errors.Join(unix.Dup3(fd, t.fd, unix.O_CLOEXEC), unix.Close(fd))
	})
	if t.lead == nil {
		t.retry(t.setUp)
	}
}

func (t *TUN) retry(f func() error) {
	for !t.waiter.stopped.Load() && f() != nil {
		t.waiter.wait(-1, 0, reopenDelay)
	}
}

// Send implements vrouter.Port.
func (t *TUN) Send(batch []*vrouter.Packet) {
	for t.vnet > 0 && len(batch) > 0 {
		batch = batch[t.sendRun(batch):]
	}
	for _, p := range batch {
		t.written, t.failure = 0, vrouter.ReasonNotSet
		b := p.Bytes()
		switch p.Offload.Segmentation {
		case vrouter.SegmentNone:
			if o := &p.Offload; o.NeedsChecksum && !packet.CompleteChecksum(b, int(o.ChecksumStart), int(o.ChecksumOffset)) {
				t.failure = vrouter.ReasonInnerMalformed
				break
			}
			t.write(b)
		case vrouter.SegmentTCPv4:
			t.split(packet.SegmentTCP(packet.IPv4(b), int(p.Offload.Size), t.scratch, t.emit))
		case vrouter.SegmentUDP:
			t.split(packet.SegmentUDP(packet.IPv4(b), int(p.Offload.Size), t.scratch, t.emit))
		default:
			t.failure = vrouter.ReasonOffloadUnsupported
		}
		p.Sent, p.Drop = t.written, t.failure
	}
}

// split notes a superpacket that is none: its headers contradict what the kernel said about it.
func (t *TUN) split(fault packet.Fault) {
	if fault != packet.FaultNone {
		t.failure = vrouter.ReasonInnerMalformed
	}
}

// write hands one packet to the kernel. The kernel takes it or refuses it at once; it never asks us to wait.
func (t *TUN) write(b []byte) {
	for {
		_, err := unix.Write(t.fd, b)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			t.failure = vrouter.ReasonSendFailed
		} else {
			t.written++
		}
		return
	}
}

// spin implements Device.
func (t *TUN) spin(longest time.Duration) {
	for _, q := range t.all() {
		q.waiter.longest = longest
	}
}

// Counters implements vrouter.Port. The device's are the first queue's to tell.
func (t *TUN) Counters() []vrouter.Counter {
	if t.lead != nil {
		return nil
	}
	return t.vr0.Counters()
}

// Stop implements vrouter.Port, for all queues.
func (t *TUN) Stop() {
	for _, q := range t.all() {
		q.waiter.stop()
	}
}

// Close implements vrouter.Port, for all queues. The device stays.
func (t *TUN) Close() error {
	t.vr0.close()
	var errs []error
	for _, q := range t.all() {
		if q.waiter != nil {
			errs = append(errs, q.waiter.close())
		}
		for _, fd := range []int{q.fd, q.held} {
			if fd >= 0 {
				errs = append(errs, unix.Close(fd))
			}
		}
	}
	return errors.Join(errs...)
}
