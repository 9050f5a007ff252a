// Package check looks at a node for what commonly keeps Margay from working there: capabilities, sysctls, other
// software's packet filters, routes and daemons, MTUs that do not fit. It changes nothing.
//
// `margayctl node checksystem` prints what it finds, with what to do about it; margay-agent logs it at its start.
// Start reading at Host, which lists the checks; each is a function of a Node, which holds what was read of the machine.
package check

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
)

// Status is how a check ended. The zero value is a failure.
type Status uint8

// The statuses.
const (
	Fail Status = iota // Margay does not work, or not for all packets
	Warn               // something may not work, or is slower than it could be
	OK
	Unknown // it could not be found out
)

var statusNames = [...]string{Fail: "fail", Warn: "warn", OK: "ok", Unknown: "unknown"}

// String returns "fail", "warn", "ok" or "unknown".
func (s Status) String() string { return statusNames[s] }

// MarshalText implements encoding.TextMarshaler.
func (s Status) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Result is what one check has found.
type Result struct {
	Name   string `json:"name"`
	Status Status `json:"status"`
	Found  string `json:"found"`        // one line
	Do     string `json:"do,omitempty"` // what to do about it
}

// Options says what to look at.
type Options struct {
	// Underlay is the interface that leads to the other nodes; empty: that of the default route.
	Underlay string
	// Tunnel is the vRouter's device.
	Tunnel string
	// Agent says that margay-agent runs on this node: then what it sets up must be there.
	Agent bool
	// Root is put before the paths of files that are read, for tests; empty on a real node.
	Root string
}

// Host runs all checks in the calling thread's network namespace.
func Host(o Options) []Result {
	n := &Node{Options: o}
	return []Result{
		n.capabilities(),
		n.ipForward(),
		n.reversePath(),
		n.forwardPolicy(),
		n.protocol4(),
		n.foreignTunnel(),
		n.foreignBGP(),
		n.networkManager(),
		n.networkd(),
		n.mtu(),
	}
}

// Failed reports whether one of the results is a failure.
func Failed(all []Result) bool {
	for _, r := range all {
		if r.Status == Fail {
			return true
		}
	}
	return false
}

// Node is the machine that is looked at.
type Node struct {
	Options
}

// unknown is the result for what could not be read.
func unknown(name string, err error) Result {
	r := Result{Name: name, Status: Unknown, Found: oneLine(err), Do: "look by hand"}
	if errors.Is(err, fs.ErrPermission) { // EPERM and EACCES
		r.Do = "run it as root on the node"
	}
	return r
}

func oneLine(err error) string {
	if err == nil {
		err = errors.New("no answer")
	}
	return strings.ReplaceAll(err.Error(), "\n", "; ")
}

func ok(name, format string, args ...any) Result {
	return Result{Name: name, Status: OK, Found: fmt.Sprintf(format, args...)}
}
