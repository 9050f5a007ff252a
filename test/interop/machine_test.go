//go:build interop

package interop

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// kernelDir is where scripts/interop-kernel.sh has put a Debian kernel: vmlinuz and *.ko.
func kernelDir(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("MARGAY_INTEROP_KERNEL")
	if dir == "" {
		t.Fatal("MARGAY_INTEROP_KERNEL names no directory: run make interop-kernel")
	}
	return dir
}

// archive writes a cpio archive (newc), the format of an initramfs.
type archive struct {
	bytes.Buffer
	inode int
}

func (a *archive) add(name string, mode int, content []byte) {
	a.inode++
	fmt.Fprintf(a, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", a.inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0)
	a.WriteString(name + "\x00")
	a.pad()
	a.Write(content)
	a.pad()
}

func (a *archive) pad() { a.Write(make([]byte, -a.Len()&3)) }

// initramfs builds the machine's root: the guest, and the kernel's modules.
func initramfs(t *testing.T, kernel string) string {
	t.Helper()
	dir := t.TempDir()
	guest := filepath.Join(dir, "guest")
	build := exec.Command("go", "build", "-tags", "interop", "-trimpath", "-ldflags", "-s -w", "-o", guest, "./guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the guest: %v\n%s", err, out)
	}
	var a archive
	read := func(name string) []byte {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	a.add("modules", unix.S_IFDIR|0o755, nil)
	a.add("init", unix.S_IFREG|0o755, read(guest))
	modules, err := filepath.Glob(kernel + "/*.ko")
	if err != nil || len(modules) == 0 {
		t.Fatalf("no modules in %s: %v", kernel, err)
	}
	for _, m := range modules {
		a.add("modules/"+filepath.Base(m), unix.S_IFREG|0o644, read(m))
	}
	a.add("TRAILER!!!", 0, nil)
	image := filepath.Join(dir, "initramfs")
	if err := os.WriteFile(image, a.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return image
}

// wire is the cable between the node's eth0, a TAP device, and the machine's. It can be bent, and is tapped.
type wire struct {
	tap  int
	sock *net.UnixConn
	to   *net.UnixAddr

	mu   sync.Mutex
	bend func(toMachine bool, frame []byte) bool // may change a frame; false: it is lost
	pcap bytes.Buffer
}

// newWire makes eth0 in the caller's namespace, and the sockets for QEMU in dir.
func newWire(t *testing.T, dir string) (*wire, error) {
	w := &wire{to: &net.UnixAddr{Name: filepath.Join(dir, "qemu"), Net: "unixgram"}}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	var request struct {
		name  [unix.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}
	copy(request.name[:], "eth0")
	request.flags = unix.IFF_TAP | unix.IFF_NO_PI
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(&request))); errno != 0 {
		return nil, errors.Join(fmt.Errorf("TUNSETIFF: %w", errno), unix.Close(fd))
	}
	w.tap = fd
	l, err := netlink.LinkByName("eth0")
	if err != nil {
		return nil, err
	}
	err = errors.Join(netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(198, 18, 0, 1), Mask: net.CIDRMask(24, 32)}}),
		netlink.LinkSetTxQLen(l, 4096), netlink.LinkSetUp(l))
	if err != nil {
		return nil, err
	}
	w.sock, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "wire"), Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	header := []uint32{0xa1b2c3d4, 2 | 4<<16, 0, 0, 1 << 18, 1}
	if err := binary.Write(&w.pcap, binary.NativeEndian, header); err != nil {
		return nil, err
	}
	tap := os.NewFile(uintptr(fd), "eth0")
	var pumps sync.WaitGroup
	pumps.Go(func() {
		b := make([]byte, 1<<16)
		for {
			n, err := tap.Read(b)
			if err != nil {
				return
			}
			if w.pass(true, b[:n]) {
				// A machine that is not there yet, or not any more, gets nothing.
				_, _ = w.sock.WriteToUnix(b[:n], w.to)
			}
		}
	})
	pumps.Go(func() {
		b := make([]byte, 1<<16)
		for {
			n, err := w.sock.Read(b)
			if err != nil {
				return
			}
			if w.pass(false, b[:n]) {
				_, _ = tap.Write(b[:n])
			}
		}
	})
	t.Cleanup(func() {
		if err := errors.Join(tap.Close(), w.sock.Close()); err != nil {
			t.Error(err)
		}
		pumps.Wait()
	})
	return w, nil
}

// pass bends a frame, and records it as it goes on.
func (w *wire) pass(toMachine bool, frame []byte) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.bend != nil && !w.bend(toMachine, frame) {
		return false
	}
	if w.pcap.Len() < 32<<20 {
		now := time.Now()
		_ = binary.Write(&w.pcap, binary.NativeEndian, []uint32{uint32(now.Unix()), uint32(now.Nanosecond() / 1000), uint32(len(frame)), uint32(len(frame))})
		w.pcap.Write(frame)
	}
	return true
}

// bent sets what happens to frames from now on.
func (w *wire) bent(f func(toMachine bool, frame []byte) bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.bend = f
}

// accelerators are tried in this order; there are machines on which /dev/kvm opens and nothing runs.
var accelerators = []string{"kvm", "tcg"}

// startMachine starts the virtual machine at the other end of the wire, by KVM where that works.
func startMachine(t *testing.T, dir string) {
	t.Helper()
	kernel := kernelDir(t)
	image := initramfs(t, kernel)
	for len(accelerators) > 0 {
		m := boot(t, dir, kernel, image, accelerators[0])
		patience := 20 * time.Second
		if len(accelerators) == 1 {
			patience = 2 * time.Minute // it is this one or none
		}
		if m.says("Linux version", patience) {
			t.Logf("accelerator %s", accelerators[0])
			t.Cleanup(func() {
				m.kill()
				if t.Failed() {
					t.Logf("the machine's console:\n%s", m.console.String())
				}
			})
			if !m.says("guest: ready", 2*time.Minute) {
				t.Fatal("the machine did not come up")
			}
			return
		}
		m.kill()
		t.Logf("accelerator %s does not work here: %s", accelerators[0], strings.TrimSpace(m.console.String()))
		accelerators = accelerators[1:]
	}
	t.Fatal("no accelerator works")
}

// machine is a running QEMU.
type machine struct {
	qemu *exec.Cmd
	done chan struct{} // its output has ended

	mu      sync.Mutex
	console strings.Builder
	more    chan struct{} // something was said
}

func boot(t *testing.T, dir, kernel, image, accelerator string) *machine {
	t.Helper()
	m := &machine{done: make(chan struct{}), more: make(chan struct{}, 1)}
	m.qemu = exec.Command("qemu-system-x86_64", "-accel", accelerator, "-cpu", "max", "-m", "256", "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio",
		"-kernel", filepath.Join(kernel, "vmlinuz"), "-initrd", image,
		"-append", "console=ttyS0 earlyprintk=serial,ttyS0 panic=-1 net.ifnames=0",
		"-netdev", fmt.Sprintf("dgram,id=n0,local.type=unix,local.path=%s,remote.type=unix,remote.path=%s", filepath.Join(dir, "qemu"), filepath.Join(dir, "wire")),
		"-device", "virtio-net-pci,netdev=n0,mac=52:54:00:12:34:56,romfile=")
	m.qemu.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	out, err := m.qemu.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	m.qemu.Stderr = m.qemu.Stdout
	// The signal comes when the thread dies that has started it, so one that lives as long as the machine does it.
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		started <- m.qemu.Start()
		<-m.done
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(m.done)
		b := make([]byte, 4096)
		for {
			n, err := out.Read(b)
			m.mu.Lock()
			m.console.Write(b[:n])
			m.mu.Unlock()
			select {
			case m.more <- struct{}{}:
			default:
			}
			if err != nil {
				return
			}
		}
	}()
	return m
}

// says waits for words on the console.
func (m *machine) says(words string, atMost time.Duration) bool {
	limit := time.After(atMost)
	for {
		m.mu.Lock()
		found := strings.Contains(m.console.String(), words)
		m.mu.Unlock()
		if found {
			return true
		}
		select {
		case <-m.more:
		case <-m.done:
			return false
		case <-limit:
			return false
		}
	}
}

func (m *machine) kill() {
	_ = m.qemu.Process.Kill() // it may have ended by itself
	<-m.done
	_ = m.qemu.Wait()
}
