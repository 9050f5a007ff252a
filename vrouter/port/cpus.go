package port

import (
	"fmt"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// maxCPU is the highest number of a CPU that can be named: a set holds 1,024 of them (CPU_SETSIZE).
const maxCPU = 1023

// ParseCPUs reads a list of CPUs as the kernel writes it, as in "2,3" or "4-7", and checks that this process may use
// each. The empty list names none.
func ParseCPUs(list string) ([]int, error) {
	if list == "" {
		return nil, nil
	}
	var allowed unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		return nil, fmt.Errorf("ask for the CPUs: %w", err)
	}
	var cpus []int
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		from, err := strconv.Atoi(first)
		to, err2 := strconv.Atoi(last)
		if err != nil || err2 != nil || from < 0 || to < from || to > maxCPU {
			return nil, fmt.Errorf("%q: expected numbers of CPUs and ranges of them, as in 2,3 or 4-7", part)
		}
		for cpu := from; cpu <= to; cpu++ {
			if !allowed.IsSet(cpu) {
				return nil, fmt.Errorf("this process may not use CPU %d: expected some of %s", cpu, cpuList(&allowed))
			}
			cpus = append(cpus, cpu)
		}
	}
	return cpus, nil
}

// cpuList is the reverse of ParseCPUs.
func cpuList(set *unix.CPUSet) string {
	var parts []string
	for cpu := 0; cpu <= maxCPU; cpu++ {
		if !set.IsSet(cpu) {
			continue
		}
		first := cpu
		for cpu < maxCPU && set.IsSet(cpu+1) {
			cpu++
		}
		part := strconv.Itoa(first)
		if cpu > first {
			part += "-" + strconv.Itoa(cpu)
		}
		parts = append(parts, part)
	}
	return strings.Join(parts, ",")
}

// WorkerThread locks the calling goroutine to its thread, and makes that one for worker number i: with short time slices,
// and on the CPU whose turn it is, if there are CPUs.
func WorkerThread(cpus []int, i int) error {
	runtime.LockOSThread()
	shortenSlice()
	if len(cpus) == 0 {
		return nil
	}
	var set unix.CPUSet
	cpu := cpus[i%len(cpus)]
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("pin a worker to CPU %d: %w", cpu, err)
	}
	return nil
}
