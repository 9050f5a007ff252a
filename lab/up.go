package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"margay/datastore"
)

// Options say what lab to build.
type Options struct {
	Name  string // empty: DefaultName
	Nodes int    // 1 to MaxNodes
	Pods  int    // on each node, 0 to MaxPods
	MTU   int    // of the underlay, bytes; 0: DefaultMTU
	// The pool default-ipv4-ippool.
	Pool      string // CIDR; empty: 10.244.0.0/16
	IPIPMode  string // Always (also when empty), CrossSubnet or Never
	BlockSize int    // prefix length; 0: 26
	Attach    string // how packets come to the vrouters: tun, tun-plain, veth, direct, auto; empty: their default
	IO        string // how they read and write interfaces: packet, xdp, tc; empty: their default
	Queues    int    // how many queues they have, 0 to MaxQueues; 0: their default
	Threads   int    // how many threads each queue has, 1 or 2; 0: their default
	NoNAT     bool   // pods leave the cluster with their own address
	// BinDir holds vrouter, margay-agent and margay-cni; empty: where the running program lies.
	BinDir string
	// KeepOnFailure leaves a lab that did not come up as it is, to be looked at.
	KeepOnFailure bool
	// Progress receives one line for each step; nil: nobody.
	Progress io.Writer
}

// reachTimeout bounds the last step of Up, in which every pod must reach every other.
const reachTimeout = 60 * time.Second

// attachments and ios are the words that vrouter understands, and none, for its default.
var (
	attachments = []string{"", "tun", "tun-plain", "veth", "direct", "auto"}
	ios         = []string{"", "packet", "xdp", "tc"}
)

// PoolName is the lab's address pool in the datastore.
const PoolName = "default-ipv4-ippool"

// Up builds a lab, and returns once every pod reaches every other one. On failure, and when ctx ends, everything is
// removed again (unless KeepOnFailure), the logs are copied to a directory that the error names, and the error says
// what did not come up.
func (h Host) Up(ctx context.Context, o Options) (*Lab, error) {
	o.fill()
	pool, err := o.check()
	if err != nil {
		return nil, err
	}
	l, s, err := h.reserve(o, pool)
	if err != nil {
		return nil, err
	}
	if err := l.build(ctx, s, o, pool, newProgress(o.Progress)); err != nil {
		return nil, l.failed(ctx, s, o, err)
	}
	return l, nil
}

func (o *Options) fill() {
	if o.Name == "" {
		o.Name = DefaultName
	}
	if o.MTU == 0 {
		o.MTU = DefaultMTU
	}
	if o.Pool == "" {
		o.Pool = "10.244.0.0/16"
	}
	if o.IPIPMode == "" {
		o.IPIPMode = datastore.Always
	}
	if o.BinDir == "" {
		if exe, err := os.Executable(); err == nil {
			o.BinDir = filepath.Dir(exe)
		}
	}
}

// check finds what cannot work before anything is made.
func (o *Options) check() (*datastore.IPPool, error) {
	if err := CheckName(o.Name); err != nil {
		return nil, err
	}
	for _, r := range []struct {
		flag           string
		got, low, high int
	}{
		{"nodes", o.Nodes, 1, MaxNodes}, {"pods", o.Pods, 0, MaxPods}, {"mtu", o.MTU, MinMTU, MaxMTU},
		{"queues", o.Queues, 0, MaxQueues}, {"threads-per-queue", o.Threads, 0, 2},
	} {
		if r.got < r.low || r.got > r.high {
			return nil, fmt.Errorf("%s %d: expected %d to %d", r.flag, r.got, r.low, r.high)
		}
	}
	if !slices.Contains(attachments, o.Attach) {
		return nil, fmt.Errorf("attach %q: expected %s", o.Attach, strings.Join(attachments[1:], ", "))
	}
	if !slices.Contains(ios, o.IO) {
		return nil, fmt.Errorf("io %q: expected %s", o.IO, strings.Join(ios[1:], ", "))
	}
	pool := datastore.NewIPPool(PoolName)
	pool.Spec = datastore.IPPoolSpec{CIDR: o.Pool, IPIPMode: o.IPIPMode, BlockSize: o.BlockSize, NATOutgoing: !o.NoNAT}
	pool.Default()
	if err := pool.Validate(); err != nil {
		return nil, fmt.Errorf("pool: %w", err)
	}
	if prefix, err := pool.Prefix(); err != nil || !prefix.Addr().Is4() {
		return nil, fmt.Errorf("pool: spec.cidr %q: expected an IPv4 prefix: a lab's pods have IPv4 addresses", o.Pool)
	}
	// A node without a block borrows, so what counts is addresses: one for each pod, and for each node's tunnel.
	if prefix, err := pool.Prefix(); err == nil && prefix.Addr().BitLen()-prefix.Bits() < 20 && o.Nodes*(o.Pods+1) > 1<<(prefix.Addr().BitLen()-prefix.Bits()) {
		return nil, fmt.Errorf("pool: %s has %d addresses: expected at least %d, one for each pod and each node", prefix,
			1<<(prefix.Addr().BitLen()-prefix.Bits()), o.Nodes*(o.Pods+1))
	}
	if err := needRoot(); err != nil {
		return nil, err
	}
	for _, name := range []string{"vrouter", "margay-agent", "margay-cni"} {
		path := filepath.Join(o.BinDir, name)
		if info, err := os.Stat(path); err != nil || info.IsDir() || info.Mode()&0o111 == 0 {
			return nil, fmt.Errorf("%s: not an executable: run `make build`, or name the directory with --bin-dir", path)
		}
	}
	return pool, o.needTUN()
}

// needTUN is an error where the attachment needs a TUN device that cannot be had. The default does without.
func (o *Options) needTUN() error {
	if !slices.Contains([]string{"tun", "tun-plain", "direct"}, o.Attach) {
		return nil
	}
	tun, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("attach %q needs a TUN device: %w: try `modprobe tun`, pass /dev/net/tun into the container, or choose --attach veth", o.Attach, err)
	}
	return tun.Close()
}

func needRoot() error {
	if os.Geteuid() != 0 {
		return errors.New("a lab is made of network namespaces: run it as root")
	}
	return nil
}

// reserve claims the name and an underlay, and writes the first lab.json.
func (h Host) reserve(o Options, pool *datastore.IPPool) (*Lab, *state, error) {
	unlock, err := h.lock()
	if err != nil {
		return nil, nil, err
	}
	defer unlock()
	l := &Lab{host: h, name: o.Name}
	if err := l.checkFree(); err != nil {
		return nil, nil, err
	}
	subnet, err := h.freeSubnet(pool)
	if err != nil {
		return nil, nil, err
	}
	binDir, err := filepath.Abs(o.BinDir)
	if err != nil {
		return nil, nil, err
	}
	s := &state{Version: stateVersion, Name: o.Name, Created: time.Now().UTC(), Phase: phaseStarting, Owner: self(),
		Subnet: subnet, MTU: o.MTU, BinDir: binDir, Attach: o.Attach, IO: o.IO, Queues: o.Queues, Threads: o.Threads}
	for i := 1; i <= o.Nodes; i++ {
		n := &node{Name: nodeName(o.Name, i), Index: i, Address: at(subnet, i), NextPod: o.Pods + 1}
		for j := 1; j <= o.Pods; j++ {
			n.Pods = append(n.Pods, &pod{Name: podName(n.Name, j), ContainerID: newContainerID()})
		}
		s.Nodes = append(s.Nodes, n)
	}
	if err := os.Mkdir(l.Dir(), 0o755); err != nil {
		return nil, nil, err
	}
	return l, s, l.save(s)
}

// checkFree refuses a name that is in use, by a lab or by what one has left.
func (l *Lab) checkFree() error {
	_, err := os.Stat(l.Dir())
	left, nsErr := namespacesOf(l.name)
	if nsErr != nil {
		return nsErr
	}
	if errors.Is(err, os.ErrNotExist) && len(left) == 0 {
		return nil
	}
	if s, loadErr := l.load(); loadErr == nil && s.Phase == phaseStarting && s.Owner.Alive() {
		return fmt.Errorf("lab %q is being brought up by process %d: choose another --name", l.name, s.Owner.PID)
	}
	return fmt.Errorf("lab %q exists already: `margayctl lab down --name %s` removes it, or choose another --name", l.name, l.name)
}

// freeSubnet finds an underlay that no lab, no route of the host and no pod will use.
func (h Host) freeSubnet(pool *datastore.IPPool) (netip.Prefix, error) {
	used, err := usedSubnets(h.netns())
	if err != nil {
		return netip.Prefix{}, err
	}
	if prefix, err := pool.Prefix(); err == nil {
		used = append(used, prefix)
	}
	names, err := h.Names()
	if err != nil {
		return netip.Prefix{}, err
	}
	for _, name := range names {
		if s, err := (&Lab{host: h, name: name}).load(); err == nil {
			used = append(used, s.Subnet)
		}
	}
next:
	for k := range 256 {
		subnet := subnetOf(k)
		for _, u := range used {
			if u.Overlaps(subnet) {
				continue next
			}
		}
		return subnet, nil
	}
	return netip.Prefix{}, errors.New("no /24 of 198.18.0.0/16 is free for the underlay: `margayctl lab down --all` removes the labs there are")
}

// build makes everything, in the order in which one thing needs another.
func (l *Lab) build(ctx context.Context, s *state, o Options, pool *datastore.IPPool, p progress) error {
	steps := []struct {
		name string
		do   func() (string, error)
	}{
		{"network", func() (string, error) { return l.buildNetwork(ctx, s) }},
		{"etcd", func() (string, error) { return l.buildEtcd(ctx, s, pool) }},
		{"vrouter and agent on every node", func() (string, error) { return l.buildNodes(ctx, s) }},
		{"pods, attached by margay-cni", func() (string, error) { return l.buildPods(ctx, s) }},
		{"every pod reaches every other", func() (string, error) { return l.checkReach(ctx, s) }},
	}
	for _, step := range steps {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := p.step(step.name, step.do); err != nil {
			return err
		}
	}
	s.Phase, s.Owner = phaseUp, Process{}
	return l.record(s)
}

// record writes the state that Up holds in memory; nobody else changes it while the phase is starting.
func (l *Lab) record(s *state) error {
	unlock, err := l.host.lock()
	if err != nil {
		return err
	}
	defer unlock()
	return l.save(s)
}

func (l *Lab) buildNetwork(ctx context.Context, s *state) (string, error) {
	if err := l.makeUnderlay(s); err != nil {
		return "", err
	}
	for _, n := range s.Nodes {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		if err := l.makeNode(s, n); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("%d node(s) on %s", len(s.Nodes), s.Subnet), introduce(s, s.Nodes)
}

func (l *Lab) buildEtcd(ctx context.Context, s *state, pool *datastore.IPPool) (string, error) {
	c, err := l.startEtcd(s)
	if err != nil {
		return "", err
	}
	s.Etcd = c.Process
	if err := l.record(s); err != nil {
		return "", err
	}
	detail := fmt.Sprintf("%s, pool %s, ipipMode %s", s.endpoint(), pool.Spec.CIDR, pool.Spec.IPIPMode)
	return detail, withStore(ctx, s, c, seed(ctx, pool))
}

func (l *Lab) buildNodes(ctx context.Context, s *state) (string, error) {
	err := inParallel(ctx, len(s.Nodes), s.Nodes, func(ctx context.Context, n *node) error {
		vrouter, err := l.startVRouter(s, n)
		if err != nil {
			return err
		}
		n.VRouter = vrouter.Process
		agent, err := l.startAgent(s, n)
		if err != nil {
			return err
		}
		n.Agent = agent.Process
		if err := l.awaitVRouter(ctx, n, vrouter); err != nil {
			return err
		}
		return l.awaitAgent(ctx, n, agent)
	})
	return "", errors.Join(err, l.record(s))
}

func (l *Lab) buildPods(ctx context.Context, s *state) (string, error) {
	type job struct {
		n *node
		p *pod
	}
	var jobs []job
	for _, n := range s.Nodes {
		for _, p := range n.Pods {
			jobs = append(jobs, job{n, p})
		}
	}
	err := inParallel(ctx, cniParallel, jobs, func(ctx context.Context, j job) error {
		addr, _, err := l.attach(ctx, s, j.n, j.p)
		if err != nil {
			return fmt.Errorf("%w; the agent's log: %s", err, filepath.Join(l.logsDir(j.n.Name), "agent.log"))
		}
		j.p.Address = addr
		return nil
	})
	return fmt.Sprint(len(jobs)), errors.Join(err, l.record(s))
}

// checkReach is the proof that the lab works.
func (l *Lab) checkReach(ctx context.Context, s *state) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, reachTimeout)
	defer cancel()
	all := s.endpoints()
	lost, err := reachAll(ctx, all)
	if err != nil {
		return "", err
	}
	if len(lost) > 0 {
		return "", fmt.Errorf("%d of %d pairs of pods have no connection:%s\nlogs: %s",
			len(lost), len(all)*(len(all)-1), describe(lost), filepath.Join(l.Dir(), "nodes", "*", "logs"))
	}
	return fmt.Sprintf("%d pairs", len(all)*(len(all)-1)), nil
}

// endpoints lists the pods that have an address.
func (s *state) endpoints() []endpoint {
	var all []endpoint
	for _, n := range s.Nodes {
		for _, p := range n.Pods {
			if p.Address.IsValid() {
				all = append(all, endpoint{p.Name, p.Address})
			}
		}
	}
	return all
}

// failed clears away after a failed Up and completes its error.
func (l *Lab) failed(ctx context.Context, s *state, o Options, err error) error {
	if o.KeepOnFailure {
		s.Phase, s.Owner = phaseUp, Process{}
		return errors.Join(fmt.Errorf("lab %q did not come up: %w\nit is kept as it is; logs: %s; `margayctl lab down --name %s` removes it",
			l.name, err, l.Dir(), l.name), l.record(s))
	}
	if ctx.Err() != nil {
		return errors.Join(fmt.Errorf("lab %q: interrupted, and removed again (%w)", l.name, ctx.Err()), l.remove(s))
	}
	logs, copyErr := l.copyLogs()
	removeErr := l.remove(s)
	// The messages name logs that have moved.
	msg := strings.ReplaceAll(err.Error(), l.Dir(), logs)
	return errors.Join(fmt.Errorf("lab %q did not come up, and was removed again (--keep-on-failure keeps it): %s\nlogs: %s",
		l.name, msg, logs), copyErr, removeErr)
}

// copyLogs saves the logs of a lab that is about to go, and returns the directory.
func (l *Lab) copyLogs() (string, error) {
	target, err := os.MkdirTemp("", "margay-lab-"+l.name+"-")
	if err != nil {
		return l.Dir(), err
	}
	for _, pattern := range []string{"logs/*", "nodes/*/logs/*"} {
		files, err := filepath.Glob(filepath.Join(l.Dir(), pattern))
		if err != nil {
			return target, err
		}
		for _, file := range files {
			rel, err := filepath.Rel(l.Dir(), file)
			if err != nil {
				return target, err
			}
			b, err := os.ReadFile(file)
			if err != nil {
				return target, err
			}
			to := filepath.Join(target, rel)
			if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, b, 0o644)); err != nil {
				return target, err
			}
		}
	}
	return target, nil
}
