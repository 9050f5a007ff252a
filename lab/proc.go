package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process names one process for good: a process id alone may be given to another one later.
type Process struct {
	PID     int    `json:"pid"`
	Started uint64 `json:"started"` // clock ticks after boot: field 22 of /proc/PID/stat
}

// Alive tells whether the very same process still runs; a zombie does not.
func (p Process) Alive() bool {
	started, state, err := procStat(p.PID)
	return err == nil && started == p.Started && state != 'Z' && state != 'X'
}

// procStat reads when a process was started, and its state letter.
func procStat(pid int) (started uint64, state byte, err error) {
	if pid <= 0 {
		return 0, 0, os.ErrProcessDone
	}
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0, 0, err
	}
	// The second field is the command in parentheses, and may hold any byte: count from the last ')'.
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 20 || len(fields[0]) == 0 {
		return 0, 0, fmt.Errorf("/proc/%d/stat: expected 22 fields or more", pid)
	}
	started, err = strconv.ParseUint(string(fields[19]), 10, 64)
	return started, fields[0][0], err
}

// identify returns the process that has this id now.
func identify(pid int) (Process, error) {
	started, _, err := procStat(pid)
	return Process{PID: pid, Started: started}, err
}

// self is the calling process.
func self() Process {
	p, err := identify(os.Getpid())
	if err != nil {
		return Process{}
	}
	return p
}

// open returns a pidfd of the process; os.ErrProcessDone when it is gone, also when its id is another's by now.
func (p Process) open() (int, error) {
	if p.PID <= 0 {
		return -1, os.ErrProcessDone
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return -1, os.ErrProcessDone
	}
	if err != nil {
		return -1, fmt.Errorf("pidfd_open %d: %w", p.PID, err)
	}
	if !p.Alive() { // asked after opening: the descriptor can no longer come to mean another process
		unix.Close(fd)
		return -1, os.ErrProcessDone
	}
	return fd, nil
}

// stop ends the process: SIGTERM, and SIGKILL for one that is still there after grace (at once when grace is 0). It
// returns when the process is gone. A process that is gone already is no error.
func (p Process) stop(ctx context.Context, grace time.Duration) error {
	fd, err := p.open()
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if grace > 0 {
		if err := unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("signal process %d: %w", p.PID, err)
		}
		if waitPidfd(ctx, fd, grace) {
			return nil
		}
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.PID, err)
	}
	if !waitPidfd(context.WithoutCancel(ctx), fd, 10*time.Second) {
		return fmt.Errorf("process %d does not end, even killed", p.PID)
	}
	return nil
}

// waitPidfd waits until the process of the descriptor is gone, and tells whether it is.
func waitPidfd(ctx context.Context, fd int, timeout time.Duration) bool {
	const slice = 100 * time.Millisecond // how late a cancelled context is noticed
	for end := time.Now().Add(timeout); ; {
		left := min(max(time.Until(end), 0), slice)
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(left.Milliseconds()))
		if n > 0 {
			return true
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return false
		}
		if ctx.Err() != nil || !time.Now().Before(end) {
			return false
		}
	}
}

// daemon describes a process of the lab that outlives the command that starts it.
type daemon struct {
	netns string // path
	argv  []string
	log   string // path; appended to
}

// child is a daemon just started, while its parent still watches it.
type child struct {
	Process
	what string
	log  string
	gone chan struct{} // closed when the process has ended; err says how
	err  error
}

// start runs the daemon in its namespace, in a session of its own.
func (d daemon) start() (*child, error) {
	if err := os.MkdirAll(filepath.Dir(d.log), 0o755); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(d.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(d.argv[0], d.argv[1:]...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, "/"
	cmd.Env = cleanEnv()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := startIn(d.netns, cmd); err != nil {
		return nil, err
	}
	id, err := identify(cmd.Process.Pid)
	c := &child{Process: id, what: filepath.Base(d.argv[0]), log: d.log, gone: make(chan struct{})}
	go func() {
		c.err = cmd.Wait()
		close(c.gone)
	}()
	return c, err
}

// ended describes the death of a child whose gone is closed.
func (c *child) ended() error {
	how := "exit status 0"
	if c.err != nil {
		how = c.err.Error()
	}
	return fmt.Errorf("%s ended (%s): %s; its log: %s", c.what, how, lastLine(c.log), c.log)
}

// startIn starts cmd inside the network namespace at path.
func startIn(path string, cmd *exec.Cmd) error {
	return within(path, cmd.Start)
}

// cleanEnv is the environment of the lab's processes: ours, without what would point a daemon at another datastore.
func cleanEnv() []string {
	var env []string
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		switch {
		case strings.HasPrefix(name, "ETCD_"), strings.HasPrefix(name, "CNI_"), strings.HasPrefix(name, "MARGAY_"),
			name == "DATASTORE_TYPE", name == "NODENAME", name == "IP_AUTODETECTION_METHOD":
		default:
			env = append(env, kv)
		}
	}
	return env
}

// lastLine returns the last line of a log, shortened, for an error message.
func lastLine(path string) string {
	const limit = 400
	b, err := os.ReadFile(path)
	if err != nil {
		return "no log"
	}
	line := strings.TrimSpace(string(b))
	if line == "" {
		return "it said nothing"
	}
	line = line[strings.LastIndexByte(line, '\n')+1:]
	if len(line) > limit {
		line = line[:limit] + "…"
	}
	return line
}

// processesIn lists the processes inside the given namespaces, without the caller and the shells it was called from.
func processesIn(namespaces map[inode]bool) []Process {
	spare := ancestors()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var found []Process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || spare[pid] {
			continue
		}
		ns, err := inodeOf(filepath.Join("/proc", e.Name(), "ns/net"))
		if err != nil || !namespaces[ns] {
			continue // gone meanwhile, or a kernel thread
		}
		if p, err := identify(pid); err == nil {
			found = append(found, p)
		}
	}
	return found
}

// ancestors returns the ids of the calling process and of all it descends from.
func ancestors() map[int]bool {
	seen := map[int]bool{}
	for pid := os.Getpid(); pid > 0 && !seen[pid]; {
		seen[pid] = true
		b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
		if err != nil {
			break
		}
		fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
		if len(fields) < 2 {
			break
		}
		pid, _ = strconv.Atoi(string(fields[1])) // field 4, the parent
	}
	return seen
}
