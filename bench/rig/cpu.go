package rig

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// CPU is the processor time that a window took, whoever used it, and how many packets it was for.
type CPU struct {
	Wall    time.Duration
	Machine time.Duration // all processors, while they were not idle
	Source  time.Duration // the generator's process
	Sink    time.Duration // the sink's process
	Path    time.Duration // the path's own processes: vrouter, wireguard-go
	Foreign time.Duration // processes that have nothing to do with the benchmark
	Sent    uint64
	// Received is the number of packets that arrived in the window.
	Received uint64
}

// PerPacket returns the nanoseconds for each packet that arrived: the machine's less the sink's, less foreign ones, and
// less own for each packet sent. own is what generator and sink cost by themselves, in nanoseconds for each packet; it is
// measured (path "wire"), because where the kernel books what it does for a packet depends on the kernel.
func (c CPU) PerPacket(own float64) float64 {
	if c.Received == 0 {
		return 0
	}
	return (float64((c.Machine - c.Foreign).Nanoseconds()) - own*float64(c.Sent)) / float64(c.Received)
}

// Meter measures CPU from StartMeter to Stop.
type Meter struct {
	source, sink int
	path         []int
	began        time.Time
	machine      machine
	own          [3]time.Duration
	user         time.Duration // of our processes
	others       map[int]time.Duration
}

// StartMeter begins to measure. source, sink and path are process ids.
func StartMeter(source, sink int, path ...int) (*Meter, error) {
	m := &Meter{source: source, sink: sink, path: path}
	var err error
	// What takes long comes first here, and last in Stop.
	if m.others, err = others(m.ours()); err != nil {
		return nil, err
	}
	m.user, err = m.userTime()
	if err != nil {
		return nil, err
	}
	m.own, m.machine, m.began, err = m.look()
	return m, err
}

func (m *Meter) ours() map[int]bool {
	ours := map[int]bool{os.Getpid(): true, m.source: true, m.sink: true}
	for _, pid := range m.path {
		ours[pid] = true
	}
	return ours
}

// Stop ends the measurement.
func (m *Meter) Stop() (CPU, error) {
	own, now, at, err := m.look()
	if err != nil {
		return CPU{}, err
	}
	user, err := m.userTime()
	if err != nil {
		return CPU{}, err
	}
	c := CPU{Wall: at.Sub(m.began), Source: own[0] - m.own[0], Sink: own[1] - m.own[1], Path: own[2] - m.own[2]}
	n, err := processors()
	if err != nil {
		return CPU{}, err
	}
	c.Machine = time.Duration(n)*c.Wall - (now.idle - m.machine.idle)
	after, err := others(m.ours())
	if err != nil {
		return CPU{}, err
	}
	for pid, used := range after {
		c.Foreign += used - m.others[pid]
	}
	// Processes that came and went in between show only in the machine's user time.
	c.Foreign = max(c.Foreign, now.user-m.machine.user-(user-m.user), 0)
	return c, nil
}

func (m *Meter) look() (own [3]time.Duration, now machine, at time.Time, err error) {
	for i, pids := range [][]int{{m.source}, {m.sink}, m.path} {
		for _, pid := range pids {
			used, err := processTime(pid)
			if err != nil {
				return own, now, at, err
			}
			own[i] += used
		}
	}
	at = time.Now()
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return own, now, at, err
	}
	now, err = parseMachine(text)
	return own, now, at, err
}

// userHz is the unit of /proc/stat: it is 100 on every architecture, as far as user space is told.
const userHz = 100

// machine is the first line of /proc/stat: idle is how long all processors together had nothing to do, or were taken
// away by the hypervisor.
type machine struct{ idle, user time.Duration }

func parseMachine(text []byte) (machine, error) {
	line, _, _ := bytes.Cut(text, []byte("\n"))
	f := strings.Fields(string(line))
	if len(f) < 9 || f[0] != "cpu" {
		return machine{}, fmt.Errorf("/proc/stat: %q: expected cpu and at least eight numbers", line)
	}
	var ticks [9]uint64
	for i := 1; i < len(ticks); i++ {
		n, err := strconv.ParseUint(f[i], 10, 64)
		if err != nil {
			return machine{}, fmt.Errorf("/proc/stat: %w", err)
		}
		ticks[i] = n
	}
	span := func(n uint64) time.Duration { return time.Duration(n) * time.Second / userHz }
	// user, nice, system, idle, iowait, irq, softirq, steal
	return machine{idle: span(ticks[4] + ticks[5] + ticks[8]), user: span(ticks[1] + ticks[2])}, nil
}

// userTime returns what our processes have spent in user space.
func (m *Meter) userTime() (time.Duration, error) {
	var sum time.Duration
	for pid := range m.ours() {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return 0, err
		}
		s, err := parseStat(text)
		if err != nil {
			return 0, err
		}
		sum += s.user
	}
	return sum, nil
}

// processors returns how many there are in the whole machine, whatever this process may use.
func processors() (int, error) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	n := bytes.Count(text, []byte("\ncpu"))
	if n == 0 {
		return 0, fmt.Errorf("/proc/stat: no processors")
	}
	return n, nil
}

// processTime returns what all threads of a process have used, to the nanosecond.
func processTime(pid int) (time.Duration, error) {
	// The kernel's clock ids of other processes: ~pid<<3, and 2 for the scheduler's time (CPUCLOCK_SCHED).
	id := int32(^pid)<<3 | 2
	var t unix.Timespec
	if err := unix.ClockGettime(id, &t); err != nil {
		return 0, fmt.Errorf("CPU time of process %d: %w", pid, err)
	}
	return time.Duration(t.Nano()), nil
}

// others returns what every process has used that is not ours, nor a thread of the kernel.
func others(ours map[int]bool) (map[int]time.Duration, error) {
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	out := make(map[int]time.Duration, len(files))
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		p, err := parseStat(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if !p.kernel && !ours[p.pid] {
			out[p.pid] = p.user + p.system
		}
	}
	return out, nil
}

// process is what /proc/PID/stat tells.
type process struct {
	pid          int
	user, system time.Duration
	kernel       bool // a thread of the kernel
}

func parseStat(text []byte) (process, error) {
	// The name may hold anything, parentheses too; what follows the last one are numbers.
	end := bytes.LastIndexByte(text, ')')
	if end < 0 {
		return process{}, fmt.Errorf("%q: expected a name in parentheses", text)
	}
	f := strings.Fields(string(text[end+1:]))
	if len(f) < 13 {
		return process{}, fmt.Errorf("%q: expected at least 15 fields", text)
	}
	var p process
	if _, err := fmt.Sscanf(string(text), "%d", &p.pid); err != nil {
		return process{}, err
	}
	for field, to := range map[int]*time.Duration{11: &p.user, 12: &p.system} {
		n, err := strconv.ParseInt(f[field], 10, 64)
		if err != nil {
			return process{}, err
		}
		*to = time.Duration(n) * time.Second / userHz
	}
	p.kernel = f[1] == "2" || p.pid == 2
	return p, nil
}
