package table

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	_ "embed"

	"margay/vrouter/fib"
)

//go:embed rtelpm/lookup.c
var rteLPMSource []byte

// rteHop is what rte_lpm keeps of a next hop.
const rteHop = 1<<24 - 1

// RTELPM is DPDK's rte_lpm over the same prefixes, in a process of its own. It is slow to load: minutes with the full
// table. It needs a C compiler, pkg-config and DPDK's headers (Debian: gcc, pkg-config, libdpdk-dev).
type RTELPM struct {
	Loaded time.Duration // what loading took
	dir    string
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Scanner
}

// NewRTELPM compiles the program, starts it and returns when it has loaded its table. A next hop is the gateway's last 24 bits.
func NewRTELPM(prefixes []netip.Prefix, addresses []uint32) (_ *RTELPM, err error) {
	r := &RTELPM{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("rte_lpm: %w", err), r.Close())
		}
	}()
	if r.dir, err = os.MkdirTemp("", "rte_lpm"); err != nil {
		return nil, err
	}
	routes := make([]byte, 0, 12*len(prefixes))
	for _, route := range routesOf(prefixes) {
		routes = binary.NativeEndian.AppendUint32(routes, binary.BigEndian.Uint32(route.Prefix.Addr().AsSlice()))
		routes = binary.NativeEndian.AppendUint32(routes, uint32(route.Prefix.Bits()))
		routes = binary.NativeEndian.AppendUint32(routes, binary.BigEndian.Uint32(route.NextHop.Gateway.AsSlice())&rteHop)
	}
	dst := make([]byte, 0, 4*len(addresses))
	for _, a := range addresses {
		dst = binary.NativeEndian.AppendUint32(dst, a)
	}
	file := func(name string) string { return filepath.Join(r.dir, name) }
	for name, b := range map[string][]byte{"lookup.c": rteLPMSource, "routes": routes, "addresses": dst} {
		if err := os.WriteFile(file(name), b, 0o600); err != nil {
			return nil, err
		}
	}
	flags, err := exec.Command("pkg-config", "--cflags", "--libs", "libdpdk").Output()
	if err != nil {
		return nil, fmt.Errorf("pkg-config libdpdk: %w: install gcc, pkg-config and libdpdk-dev", err)
	}
	args := slices.Concat([]string{"-O3", "-march=native", "-o", file("lookup"), file("lookup.c")}, strings.Fields(string(flags)),
		[]string{"-Wno-unused-command-line-argument", "-march=native"})
	if out, err := exec.Command("gcc", args...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("gcc: %w: %s", err, out)
	}
	r.cmd = exec.Command(file("lookup"), file("routes"), file("addresses"))
	r.cmd.Stderr = os.Stderr
	if r.in, err = r.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := r.cmd.Start(); err != nil {
		r.cmd = nil
		return nil, err
	}
	r.out = bufio.NewScanner(out)
	var seconds float64
	if err := r.answer("loaded %f", &seconds); err != nil {
		return nil, err
	}
	r.Loaded = time.Duration(seconds * float64(time.Second))
	return r, nil
}

func (r *RTELPM) answer(format string, into ...any) error {
	if !r.out.Scan() {
		return errors.Join(errors.New("the program has ended"), r.out.Err())
	}
	if _, err := fmt.Sscanf(r.out.Text(), format, into...); err != nil {
		return fmt.Errorf("it answers %q: %w", r.out.Text(), err)
	}
	return nil
}

// Lookups looks n addresses up in bulks of 64, from the front of the addresses and round. It returns how long that took
// inside the program, and the sum of the next hops.
func (r *RTELPM) Lookups(n int) (took time.Duration, sum uint64, err error) {
	if _, err := fmt.Fprintln(r.in, n); err != nil {
		return 0, 0, fmt.Errorf("rte_lpm: %w", err)
	}
	var nanos float64
	if err := r.answer("%f %d", &nanos, &sum); err != nil {
		return 0, 0, fmt.Errorf("rte_lpm: %w", err)
	}
	return time.Duration(nanos), sum, nil
}

// Check compares its answers for the addresses with those of our form.
func (r *RTELPM) Check(f *Forms, addresses []uint32) error {
	_, theirs, err := r.Lookups(len(addresses))
	if err != nil {
		return err
	}
	ours := f.All[slices.IndexFunc(f.All, func(f Form) bool { return f.Name == Ours })]
	hops, sum := make([]fib.Hop, len(addresses)), uint64(0)
	ours.Batch(addresses, hops)
	for _, h := range hops {
		sum += uint64(h.Gateway() & rteHop)
	}
	if sum != theirs {
		return fmt.Errorf("rte_lpm: the sum of the next hops of %d addresses is %d, ours is %d", len(addresses), theirs, sum)
	}
	return nil
}

// Close ends the program.
func (r *RTELPM) Close() error {
	var errs []error
	if r.cmd != nil {
		errs = append(errs, r.in.Close(), r.cmd.Wait())
	}
	if r.dir != "" {
		errs = append(errs, os.RemoveAll(r.dir))
	}
	return errors.Join(errs...)
}
