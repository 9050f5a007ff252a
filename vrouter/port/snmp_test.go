package port_test

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// snmp returns the counters of one group of the calling thread's namespace.
func snmp(group string) (map[string]int, error) {
	text, err := os.ReadFile("/proc/thread-self/net/snmp")
	if err != nil {
		return nil, err
	}
	var names []string
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) == 0 || fields[0] != group {
			continue
		}
		if names == nil {
			names = fields
			continue
		}
		values := make(map[string]int, len(fields))
		for i := 1; i < min(len(names), len(fields)); i++ {
			if values[names[i]], err = strconv.Atoi(fields[i]); err != nil {
				return nil, err
			}
		}
		return values, nil
	}
	return nil, fmt.Errorf("no group %s in /proc/net/snmp", group)
}
