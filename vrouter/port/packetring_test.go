package port_test

import (
	"bytes"
	"encoding/binary"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/vrouter"
	"margay/vrouter/port"
)

// newVeth returns a vr0 with jumbo frames, and a socket that sends on the kernel's end of it. The test stays on one
// processor, because the kernel keeps the order of packets only on each.
func newVeth(t *testing.T) (s *space, v *port.Veth, fd int) {
	t.Helper()
	pin(t)
	s = newSpace(t)
	s.do(t, func() (err error) {
		if v, err = port.OpenVeth("vr0"); err != nil {
			return err
		}
		if err := v.SetMTU(9000); err != nil {
			return err
		}
		vr0, err := netlink.LinkByName("vr0")
		if err != nil {
			return err
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: vr0.Attrs().Index})
	})
	t.Cleanup(func() {
		_ = unix.Close(fd)
		if err := v.Close(); err != nil {
			t.Error(err)
		}
	})
	return s, v, fd
}

// pin keeps the test's goroutine on the first processor that it may use.
func pin(t *testing.T) {
	t.Helper()
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		t.Fatal(err)
	}
	for cpu := 0; one.Count() == 0; cpu++ {
		if all.IsSet(cpu) {
			one.Set(cpu)
		}
	}
	runtime.LockOSThread()
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.SchedSetaffinity(0, &all); err != nil {
			t.Error(err)
		}
		runtime.UnlockOSThread()
	})
}

// numbered returns a frame for vr0's twin with an IPv4 packet of length bytes that carries number.
func numbered(length, number int) []byte {
	b := make([]byte, 14+length)
	b[12] = 0x08
	copy(b[14:], header(17, length, podAddress(1).As4(), podAddress(2).As4()))
	for i := 34; i < len(b); i++ {
		b[i] = byte(i + number)
	}
	binary.BigEndian.PutUint32(b[34:], uint32(number))
	return b
}

// take receives packets until there are want, and returns them; it stops the port when they do not come.
func take(t *testing.T, v *port.Veth, want int) (all [][]byte) {
	t.Helper()
	timer := time.AfterFunc(60*time.Second, v.Stop)
	defer timer.Stop()
	batch := make([]*vrouter.Packet, 64)
	for i := range batch {
		batch[i] = vrouter.NewPacket()
	}
	for len(all) < want {
		n, err := v.Recv(batch)
		if err != nil {
			t.Fatalf("%d packets of %d came: %v", len(all), want, err)
		}
		for _, p := range batch[:n] {
			all = append(all, bytes.Clone(p.Bytes()))
		}
	}
	return all
}

func dropped(v *port.Veth) uint64 {
	for _, c := range v.Counters() {
		if c.Name == "kernel_vr0_queue_dropped" {
			return c.Packets
		}
	}
	return ^uint64(0)
}

// TestRing: packets that fit the ring's slots, that just fit or just do not, and that are several times as long come
// in the order in which they were sent, several times around the ring.
func TestRing(t *testing.T) {
	_, v, fd := newVeth(t)
	lengths := []int{40, 100, 1500, 1573, 1574, 1575, 1600, 9000, 2000, 60, 41, 9000}
	number := 0
	for range 30 {
		first := number
		for range 401 {
			if _, err := unix.Write(fd, numbered(lengths[number%len(lengths)], number)); err != nil {
				t.Fatal(err)
			}
			number++
		}
		for i, got := range take(t, v, number-first) {
			if want := numbered(lengths[(first+i)%len(lengths)], first+i)[14:]; !bytes.Equal(got, want) {
				t.Fatalf("packet %d: %d bytes, want %d", first+i, len(got), len(want))
			}
		}
	}
	if n := dropped(v); n != 0 {
		t.Errorf("%d dropped", n)
	}
}

// TestRingFull: what the ring or the socket has no room for is counted, each packet once, and everything else comes; and
// what comes afterwards comes too.
func TestRingFull(t *testing.T) {
	for _, c := range []struct {
		name    string
		lengths []int
		sent    int
	}{
		{"short", []int{60}, 5000},
		{"long", []int{9000}, 2500}, // the socket's buffer is full before the ring
		{"both", []int{9000, 60}, 6000},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, v, fd := newVeth(t)
			for i := range c.sent {
				if _, err := unix.Write(fd, numbered(c.lengths[i%len(c.lengths)], i)); err != nil {
					t.Fatal(err)
				}
			}
			// The last one finds room again.
			batch, last, came := []*vrouter.Packet{vrouter.NewPacket()}, -1, 0
			receive := func() {
				if n, err := v.Recv(batch); n != 1 || err != nil {
					t.Fatal(n, err)
				}
				number := int(binary.BigEndian.Uint32(batch[0].Bytes()[20:]))
				if want := numbered(c.lengths[number%len(c.lengths)], number)[14:]; number <= last || !bytes.Equal(batch[0].Bytes(), want) {
					t.Fatalf("packet %d came after %d, %d bytes", number, last, batch[0].Len)
				}
				last = number
				came++
			}
			receive()
			if _, err := unix.Write(fd, numbered(c.lengths[0], c.sent*len(c.lengths))); err != nil {
				t.Fatal(err)
			}
			for last < c.sent*len(c.lengths) {
				receive()
			}
			lost := c.sent + 1 - came
			if lost == 0 || dropped(v) != uint64(lost) {
				t.Errorf("%d lost of %d, %d counted", lost, c.sent, dropped(v))
			}
		})
	}
}

// TestRingDown: an interface that goes down does not keep the receiver busy, and it receives once it is up again.
func TestRingDown(t *testing.T) {
	s, v, fd := newVeth(t)
	set := func(up bool) {
		s.do(t, func() error {
			twin, err := netlink.LinkByName("vr0-io")
			if err != nil {
				return err
			}
			if up {
				return netlink.LinkSetUp(twin)
			}
			return netlink.LinkSetDown(twin)
		})
	}
	used := func() time.Duration {
		var r unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
			t.Fatal(err)
		}
		return time.Duration(r.Utime.Nano() + r.Stime.Nano())
	}
	set(false)
	before := used()
	done := make(chan [][]byte)
	go func() { done <- take(t, v, 1) }()
	time.Sleep(time.Second) // what is measured is time
	if busy := used() - before; busy > 300*time.Millisecond {
		t.Errorf("%v of CPU time in a second without an interface", busy)
	}
	set(true)
	frame := numbered(100, 1)
	for {
		if _, err := unix.Write(fd, frame); err != nil && err != unix.ENETDOWN {
			t.Fatal(err)
		}
		select {
		case got := <-done:
			if !bytes.Equal(got[0], frame[14:]) {
				t.Errorf("%d bytes came", len(got[0]))
			}
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// TestRingAllocations: receiving allocates nothing, whether packets fit the slots or not.
func TestRingAllocations(t *testing.T) {
	_, v, fd := newVeth(t)
	batch := []*vrouter.Packet{vrouter.NewPacket()}
	for _, length := range []int{100, 9000} {
		frame := numbered(length, 1)
		if n := testing.AllocsPerRun(100, func() {
			if _, err := unix.Write(fd, frame); err != nil {
				t.Fatal(err)
			}
			batch[0].Reset()
			if n, err := v.Recv(batch); n != 1 || err != nil || batch[0].Len != length {
				t.Fatal(n, err, batch[0].Len)
			}
		}); n != 0 {
			t.Errorf("%d bytes: %v allocations", length, n)
		}
	}
}
