package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"syscall"
	"time"

	"margay/datastore"
)

// Daemons of a node, as Restart names them.
const (
	VRouter = "vrouter"
	Agent   = "agent"
)

// Exec replaces the calling process by a command inside the namespace of a node, a pod or the underlay (full or short
// name), so that its exit status, signals and terminal are the command's own. It returns only on failure.
func (l *Lab) Exec(target string, argv []string) error {
	path, err := l.NetNS(target)
	if err != nil {
		return err
	}
	file, err := exec.LookPath(argv[0])
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := enter(path); err != nil {
		return err
	}
	return fmt.Errorf("execute %s: %w", file, syscall.Exec(file, argv, os.Environ()))
}

// Start starts cmd inside the namespace of a node, a pod or the underlay (full or short name).
func (l *Lab) Start(target string, cmd *exec.Cmd) error {
	path, err := l.NetNS(target)
	if err != nil {
		return err
	}
	return startIn(path, cmd)
}

// NetNS returns the path of the namespace of a node, a pod or the underlay (full or short name).
func (l *Lab) NetNS(target string) (string, error) {
	s, err := l.load()
	if err != nil {
		return "", err
	}
	name, err := s.namespace(target)
	return netnsPath(name), err
}

// ready loads the state of a lab that has come up.
func (l *Lab) ready() (*state, error) {
	if err := needRoot(); err != nil {
		return nil, err
	}
	s, err := l.load()
	if err != nil {
		return nil, err
	}
	if s.Phase != phaseUp {
		if s.Owner.Alive() {
			return nil, fmt.Errorf("lab %q is still coming up (process %d)", l.name, s.Owner.PID)
		}
		return nil, l.damaged("was never finished")
	}
	return s, nil
}

// readyNode is ready, with one node of the lab.
func (l *Lab) readyNode(name string) (*state, *node, error) {
	s, err := l.ready()
	if err != nil {
		return nil, nil, err
	}
	n, err := s.node(name)
	return s, n, err
}

// setProcess notes a daemon's new process.
func (l *Lab) setProcess(nodeName, what string, p Process) error {
	return l.update(func(s *state) error {
		n, err := s.node(nodeName)
		if err != nil {
			return err
		}
		if what == VRouter {
			n.VRouter = p
		} else {
			n.Agent = p
		}
		return nil
	})
}

// launch starts one daemon of a node and waits until it serves.
func (l *Lab) launch(ctx context.Context, s *state, n *node, what string) error {
	start, wait := l.startAgent, l.awaitAgent
	if what == VRouter {
		start, wait = l.startVRouter, l.awaitVRouter
	}
	c, err := start(s, n)
	if err != nil {
		return err
	}
	if err := l.setProcess(n.Name, what, c.Process); err != nil {
		return errors.Join(err, c.stop(context.Background(), 0))
	}
	return wait(ctx, n, c)
}

// Restart ends one daemon of a node, VRouter or Agent, by SIGTERM, or by SIGKILL with hard, and starts it again. It
// also starts one that is dead. It returns when the daemon serves.
func (l *Lab) Restart(ctx context.Context, nodeName, what string, hard bool) error {
	if what != VRouter && what != Agent {
		return fmt.Errorf("daemon %q: expected %s or %s", what, VRouter, Agent)
	}
	s, n, err := l.readyNode(nodeName)
	if err != nil {
		return err
	}
	old := n.Agent
	if what == VRouter {
		old = n.VRouter
	}
	if err := old.stop(ctx, grace(hard)); err != nil {
		return err
	}
	return l.launch(ctx, s, n, what)
}

// RestartEtcd ends the lab's datastore, by SIGTERM, or by SIGKILL with hard, and starts it again on its data.
func (l *Lab) RestartEtcd(ctx context.Context, hard bool) error {
	s, err := l.ready()
	if err != nil {
		return err
	}
	if err := s.Etcd.stop(ctx, grace(hard)); err != nil {
		return err
	}
	c, err := l.startEtcd(s)
	if err != nil {
		return err
	}
	err = l.update(func(s *state) error {
		s.Etcd = c.Process
		return nil
	})
	if err != nil {
		return errors.Join(err, c.stop(context.Background(), 0))
	}
	return withStore(ctx, s, c, func(*datastore.Store) error { return nil })
}

func grace(hard bool) time.Duration {
	if hard {
		return 0
	}
	return stopGrace
}

// StopNode stops a node's daemons: the agent first, so that it can end its BGP sessions. With hard it is a power loss
// instead: the node is off the network and its daemons are dead at once, and nobody is told.
func (l *Lab) StopNode(ctx context.Context, nodeName string, hard bool) error {
	_, n, err := l.readyNode(nodeName)
	if err != nil {
		return err
	}
	if hard {
		// First the wire: the kernel would close a killed process' connections, which is a message, too.
		if err := unplugNode(n); err != nil {
			return err
		}
	}
	if err := errors.Join(n.Agent.stop(ctx, grace(hard)), n.VRouter.stop(ctx, grace(hard))); err != nil {
		return err
	}
	return errors.Join(l.setProcess(n.Name, Agent, Process{}), l.setProcess(n.Name, VRouter, Process{}))
}

// StartNode starts what is not running of a node, and returns when it serves. Its pods are where they were.
func (l *Lab) StartNode(ctx context.Context, nodeName string) error {
	s, n, err := l.readyNode(nodeName)
	if err != nil {
		return err
	}
	if err := errors.Join(raiseNode(s, n), introduce(s, []*node{n})); err != nil {
		return err
	}
	if !n.VRouter.Alive() {
		if err := l.launch(ctx, s, n, VRouter); err != nil {
			return err
		}
	}
	if !n.Agent.Alive() {
		return l.launch(ctx, s, n, Agent)
	}
	return nil
}

// AddedPod is a pod that AddPods has attached.
type AddedPod struct {
	Name    string        `json:"name"`
	Address netip.Addr    `json:"address"`
	Took    time.Duration `json:"took"` // the ADD alone, in nanoseconds
}

// AddPods attaches new pods to a node, several at a time, and returns those that were attached, also on error. The
// first failure ends it; of the pod that failed nothing is left.
func (l *Lab) AddPods(ctx context.Context, nodeName string, count int) ([]AddedPod, error) {
	s, n, err := l.readyNode(nodeName)
	if err != nil {
		return nil, err
	}
	if count < 1 {
		return nil, fmt.Errorf("count %d: expected at least 1", count)
	}
	var pods []*pod
	err = l.update(func(s *state) error { // names first: what a crash leaves is on record
		n, err := s.node(n.Name)
		if err != nil {
			return err
		}
		for range count {
			pods = append(pods, &pod{Name: podName(n.Name, n.NextPod), ContainerID: newContainerID()})
			n.NextPod++
		}
		n.Pods = append(n.Pods, pods...)
		return nil
	})
	if err != nil {
		return nil, err
	}
	results := make([]AddedPod, count)
	indices := make([]int, count)
	for i := range indices {
		indices[i] = i
	}
	addErr := inParallel(ctx, cniParallel, indices, func(ctx context.Context, i int) error {
		addr, took, err := l.attach(ctx, s, n, pods[i])
		if err == nil {
			results[i] = AddedPod{Name: pods[i].Name, Address: addr, Took: took}
		}
		return err
	})
	err = l.update(func(s *state) error {
		n, err := s.node(n.Name)
		if err != nil {
			return err
		}
		for i, p := range pods {
			at := slices.IndexFunc(n.Pods, func(q *pod) bool { return q.Name == p.Name })
			switch {
			case at < 0:
			case results[i].Name == "":
				n.Pods = slices.Delete(n.Pods, at, at+1)
			default:
				n.Pods[at].Address = results[i].Address
			}
		}
		return nil
	})
	results = slices.DeleteFunc(results, func(r AddedPod) bool { return r.Name == "" })
	return results, errors.Join(addErr, err)
}

// RemovePods detaches pods and removes their namespaces, several at a time. A pod whose DEL fails stays on record.
func (l *Lab) RemovePods(ctx context.Context, names ...string) error {
	s, err := l.ready()
	if err != nil {
		return err
	}
	type job struct {
		n *node
		p *pod
	}
	var jobs []job
	for _, name := range names {
		n, p, err := s.pod(name)
		if err != nil {
			return err
		}
		jobs = append(jobs, job{n, p})
	}
	return inParallel(ctx, cniParallel, jobs, func(ctx context.Context, j job) error {
		if _, err := l.callCNI(ctx, s, j.n, j.p, "DEL"); err != nil {
			return err
		}
		if err := deleteNetNS(j.p.Name); err != nil {
			return err
		}
		return l.update(func(s *state) error {
			n, err := s.node(j.n.Name)
			if err != nil {
				return err
			}
			n.Pods = slices.DeleteFunc(n.Pods, func(p *pod) bool { return p.Name == j.p.Name })
			return nil
		})
	})
}

// Unreachable returns, in a line each, the pairs of pods that have no connection within the time that ctx leaves.
func (l *Lab) Unreachable(ctx context.Context) ([]string, error) {
	s, err := l.ready()
	if err != nil {
		return nil, err
	}
	lost, err := reachAll(ctx, s.endpoints())
	lines := make([]string, len(lost))
	for i, u := range lost {
		lines[i] = u.String()
	}
	return lines, err
}
