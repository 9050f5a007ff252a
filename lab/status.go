package lab

import (
	"fmt"
	"net/netip"
)

// Status is what `lab status -o json` prints.
type Status struct {
	Name     string       `json:"name"`
	State    string       `json:"state"` // up, starting, or degraded: a process that should run does not
	Etcd     []string     `json:"etcd"`  // client URLs
	Underlay string       `json:"underlay"`
	Subnet   netip.Prefix `json:"subnet"`
	MTU      int          `json:"mtu"` // of the underlay, bytes
	Dir      string       `json:"dir"`
	Nodes    []NodeStatus `json:"nodes"`
}

// NodeStatus describes one node.
type NodeStatus struct {
	Name    string      `json:"name"`
	NetNS   string      `json:"netns"`
	Address netip.Addr  `json:"address"`
	State   string      `json:"state"` // up, stopped, or what is dead
	PIDs    PIDs        `json:"pids"`
	RunDir  string      `json:"runDir"`
	Logs    string      `json:"logs"`
	Pods    []PodStatus `json:"pods"`
}

// PIDs are the process ids of a node's daemons; 0 for one that does not run.
type PIDs struct {
	VRouter int `json:"vrouter"`
	Agent   int `json:"agent"`
}

// PodStatus describes one pod.
type PodStatus struct {
	Name    string     `json:"name"`
	NetNS   string     `json:"netns"`
	Address netip.Addr `json:"address"`
}

// Status looks at the lab as it is now.
func (l *Lab) Status() (Status, error) {
	s, err := l.load()
	if err != nil {
		return Status{}, err
	}
	st := Status{Name: l.name, State: "up", Etcd: []string{s.endpoint()}, Underlay: underlayName(l.name), Subnet: s.Subnet,
		MTU: s.MTU, Dir: l.Dir(), Nodes: []NodeStatus{}}
	for _, n := range s.Nodes {
		ns := NodeStatus{Name: n.Name, NetNS: n.Name, Address: n.Address, RunDir: l.runDir(n.Name), Logs: l.logsDir(n.Name),
			PIDs: PIDs{VRouter: alivePID(n.VRouter), Agent: alivePID(n.Agent)}, Pods: []PodStatus{}}
		ns.State = nodeState(n, ns.PIDs)
		if ns.State != "up" && ns.State != "stopped" {
			st.State = "degraded"
		}
		for _, p := range n.Pods {
			ns.Pods = append(ns.Pods, PodStatus{Name: p.Name, NetNS: p.Name, Address: p.Address})
		}
		st.Nodes = append(st.Nodes, ns)
	}
	switch {
	case s.Phase == phaseStarting:
		st.State = phaseStarting
	case !s.Etcd.Alive():
		st.State = "degraded: etcd is dead"
	}
	return st, nil
}

func nodeState(n *node, pids PIDs) string {
	switch {
	case pids.VRouter > 0 && pids.Agent > 0:
		return "up"
	case n.VRouter.PID == 0 && n.Agent.PID == 0:
		return "stopped"
	case pids.VRouter > 0:
		return "agent dead"
	case pids.Agent > 0:
		return "vrouter dead"
	}
	return "vrouter and agent dead"
}

func alivePID(p Process) int {
	if p.Alive() {
		return p.PID
	}
	return 0
}

// Env returns shell commands that point calicoctl, margayctl and other tools at the lab's datastore.
func (l *Lab) Env() (string, error) {
	s, err := l.load()
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("export DATASTORE_TYPE=etcdv3\nexport ETCD_ENDPOINTS=%s\n", s.endpoint()), nil
}
