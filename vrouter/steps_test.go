//go:build amd64 && !race

package vrouter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// How many instructions a piece of the loop takes is the same on every machine, however busy, and so it can be held to where
// a time cannot. A virtual machine often has no counter for them, so this is done with a debugger's single step: another
// process of this test binary makes the piece ready, stops, goes through it instruction by instruction, and stops again.

// stepEnv names, in the environment of that process, the piece that it is for.
const stepEnv = "MARGAY_TEST_STEPS"

func init() {
	if os.Getenv(stepEnv) != "" {
		runtime.LockOSThread() // TestMain runs on the first thread then, which is the one that is traced
	}
}

func TestMain(m *testing.M) {
	if name := os.Getenv(stepEnv); name != "" {
		stepThrough(stepped[name]())
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// stepThrough is what that process does, in place of the tests.
func stepThrough(piece func()) {
	debug.SetGCPercent(-1)
	for range 3 {
		piece() // caches and the stack have their size now
	}
	time.Sleep(time.Millisecond) // a time slice begins
	stop()
	piece()
	stop()
}

// stop tells the tracer. It is no system call that the scheduler knows of.
func stop() {
	syscall.RawSyscall(syscall.SYS_TGKILL, uintptr(syscall.Getpid()), uintptr(syscall.Gettid()), uintptr(syscall.SIGSTOP))
}

// errPreempted: the scheduler has taken the thread, which it does when a time slice is over. It has to be tried again.
var errPreempted = errors.New("preempted")

// steps returns how many instructions a piece takes, in all and in each function.
func steps(t *testing.T, piece string) (int, map[string]int) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for {
		n, by, err := stepOnce(piece)
		if err == nil {
			return n, by
		}
		if !errors.Is(err, errPreempted) || time.Now().After(deadline) {
			t.Fatalf("single steps of %s: %v", piece, err)
		}
	}
}

func stepOnce(piece string) (n int, by map[string]int, err error) {
	runtime.LockOSThread() // only the thread that has started a process may trace it
	defer runtime.UnlockOSThread()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Env = append(os.Environ(), stepEnv+"="+piece, "GODEBUG=asyncpreemptoff=1", "GOMAXPROCS=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return 0, nil, err
	}
	pid := cmd.Process.Pid
	var frozen []int
	defer func() {
		_ = cmd.Process.Kill()
		for _, tid := range frozen {
			var ws syscall.WaitStatus
			_, _ = syscall.Wait4(tid, &ws, syscall.WALL, nil) // a thread that is traced has its tracer to bury it
		}
		_ = cmd.Wait() // killed
	}()
	if err := await(pid, syscall.SIGTRAP); err != nil { // execve
		return 0, nil, err
	}
	if err := syscall.PtraceCont(pid, 0); err != nil {
		return 0, nil, err
	}
	if err := await(pid, syscall.SIGSTOP); err != nil {
		return 0, nil, err
	}
	if frozen, err = freeze(pid); err != nil {
		return 0, nil, err
	}
	by = make(map[string]int)
	for {
		if err := syscall.PtraceSingleStep(pid); err != nil {
			return 0, nil, err
		}
		var ws syscall.WaitStatus
		if _, err := syscall.Wait4(pid, &ws, syscall.WALL, nil); err != nil {
			return 0, nil, err
		}
		if ws.Stopped() && ws.StopSignal() == syscall.SIGSTOP {
			return n, by, nil
		}
		if !ws.Stopped() || ws.StopSignal() != syscall.SIGTRAP {
			return 0, nil, fmt.Errorf("status %#x in place of a step", ws)
		}
		var regs syscall.PtraceRegs
		if err := syscall.PtraceGetRegs(pid, &regs); err != nil {
			return 0, nil, err
		}
		n++
		name := "?"
		if f := runtime.FuncForPC(uintptr(regs.PC())); f != nil { // the same binary, at the same addresses
			name = f.Name()
		}
		if strings.HasPrefix(name, "runtime.morestack") {
			return 0, nil, errPreempted
		}
		by[name]++
	}
}

// freeze stops the other threads of a process whose first thread is stopped: the scheduler is among them, and would take the
// processor away after a time slice, which single steps are too slow for.
func freeze(pid int) (frozen []int, err error) {
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return nil, err
	}
	for _, e := range threads {
		tid, err := strconv.Atoi(e.Name())
		if err != nil || tid == pid {
			continue
		}
		if err := syscall.PtraceAttach(tid); errors.Is(err, syscall.ESRCH) {
			continue // it has ended meanwhile
		} else if err != nil {
			return frozen, fmt.Errorf("attach to thread %d: %w", tid, err)
		}
		frozen = append(frozen, tid)
		if err := await(tid, syscall.SIGSTOP); err != nil {
			return frozen, err
		}
	}
	return frozen, nil
}

// await waits until the traced process stops by a signal. Others it gets.
func await(pid int, signal syscall.Signal) error {
	for {
		var ws syscall.WaitStatus
		if _, err := syscall.Wait4(pid, &ws, syscall.WALL, nil); err != nil {
			return err
		}
		switch {
		case !ws.Stopped():
			return fmt.Errorf("status %#x: expected to be stopped", ws)
		case ws.StopSignal() == signal:
			return nil
		}
		if err := syscall.PtraceCont(pid, int(ws.StopSignal())); err != nil {
			return err
		}
	}
}
