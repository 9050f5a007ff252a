package lab

// NodeContext says where in a lab the calling process is.
type NodeContext struct {
	Lab       string
	Node      string   // empty in the underlay
	RunDir    string   // the node's sockets; empty in the underlay
	Endpoints []string // etcd's client URLs
}

// Current finds the lab, and the node, in whose network namespace the caller runs. A pod counts to its node.
func Current() (NodeContext, bool) { return Host{}.current() }

func (h Host) current() (NodeContext, bool) {
	own, err := inodeOf(ownNetNS)
	if err != nil {
		return NodeContext{}, false
	}
	names, err := h.Names()
	if err != nil {
		return NodeContext{}, false
	}
	for _, name := range names {
		l := &Lab{host: h, name: name}
		s, err := l.load()
		if err != nil {
			continue
		}
		here := NodeContext{Lab: name, Endpoints: []string{s.endpoint()}}
		is := func(ns string) bool {
			id, err := inodeOf(netnsPath(ns))
			return err == nil && id == own
		}
		if is(underlayName(name)) {
			return here, true
		}
		for _, n := range s.Nodes {
			inside := is(n.Name)
			for i := 0; !inside && i < len(n.Pods); i++ {
				inside = is(n.Pods[i].Name)
			}
			if inside {
				here.Node, here.RunDir = n.Name, l.runDir(n.Name)
				return here, true
			}
		}
	}
	return NodeContext{}, false
}
