package traffic

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// BulkPort is the TCP port of the bulk receiver.
const BulkPort = 9010

// bulkChunk is the length in bytes of one write and of one read, the same as iperf3's.
const bulkChunk = 128 << 10

// ReceiveBulk takes TCP connections in the calling thread's network namespace, reads what comes and counts the bytes on the
// board. It returns only with an error. Its sockets block: no poller of Go's is between them and the kernel.
func ReceiveBulk(b *Board) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return fmt.Errorf("SO_REUSEADDR: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: BulkPort}); err != nil {
		return fmt.Errorf("bind to port %d: %w", BulkPort, err)
	}
	if err := unix.Listen(fd, 128); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	b.Live.Store(1)
	for {
		conn, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) {
			continue
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		go func() {
			defer unix.Close(conn)
			for buf := make([]byte, bulkChunk); ; {
				n, err := unix.Read(conn, buf)
				if errors.Is(err, unix.EINTR) {
					continue
				}
				if n <= 0 {
					return // the sender has ended, or been killed
				}
				b.Bytes.Add(uint64(n))
			}
		}()
	}
}

// SendBulk opens so many TCP connections and writes to each as fast as it goes while the board says so. It returns only with
// an error.
func SendBulk(to netip.Addr, flows int, b *Board) error {
	var fds []int
	for range flows {
		fd, err := dial(to)
		if err != nil {
			return err
		}
		fds = append(fds, fd)
	}
	b.Live.Store(1)
	var wg sync.WaitGroup
	errs := make([]error, flows)
	for i, fd := range fds {
		wg.Go(func() { errs[i] = write(fd, b) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func dial(to netip.Addr) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("socket: %w", err)
	}
	for began := time.Now(); ; {
		err := unix.Connect(fd, &unix.SockaddrInet4{Port: BulkPort, Addr: to.As4()})
		if err == nil {
			return fd, nil
		}
		if !errors.Is(err, unix.EINTR) || time.Since(began) > time.Minute {
			_ = unix.Close(fd)
			return 0, fmt.Errorf("connect to %v: %w", to, err)
		}
	}
}

func write(fd int, b *Board) error {
	buf := make([]byte, bulkChunk)
	for {
		if b.Run.Load() == 0 {
			time.Sleep(time.Millisecond)
			continue
		}
		n, err := unix.Write(fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("write: %w", err)
		}
		b.Bytes.Add(uint64(n))
	}
}
