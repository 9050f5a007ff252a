package rig

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"margay/vrouter/rpc"
)

// patience bounds the wait for anything that a daemon has to do.
const patience = 10 * time.Second

// daemon is a process of a bed that runs as long as the bed does.
type daemon struct {
	cmd    *exec.Cmd
	output bytes.Buffer
	ended  chan struct{}
	client *rpc.Client // of a vrouter
}

// start starts a daemon in a space of the bed, and has Close end it.
func (b *Bed) start(s *Space, cmd *exec.Cmd) (*daemon, error) {
	d := &daemon{cmd: cmd, ended: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &d.output, &d.output
	if err := s.Start(cmd); err != nil {
		return nil, err
	}
	go func() {
		_ = cmd.Wait() // its output tells
		close(d.ended)
	}()
	b.closers = append(b.closers, d.stop)
	return d, nil
}

func (d *daemon) stop() error {
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-d.ended:
	case <-time.After(patience):
		_ = d.cmd.Process.Kill()
		<-d.ended
		return fmt.Errorf("%s: did not end within %v of SIGTERM", d.cmd.Args[0], patience)
	}
	if d.client != nil {
		return d.client.Close()
	}
	return nil
}

// await waits until ready says yes. A daemon that ends meanwhile has its output told.
func (d *daemon) await(ctx context.Context, what string, ready func() error) error {
	for deadline := time.Now().Add(patience); ; {
		err := ready()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: not within %v: %w", what, patience, err)
		}
		select {
		case <-d.ended:
			return fmt.Errorf("%s ended: %s", filepath.Base(d.cmd.Path), strings.TrimSpace(d.output.String()))
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// vrouter starts node i's vRouter and programs it as the agent would.
func (b *Bed) vrouter(ctx context.Context, i int) error {
	binary := b.options.VRouter
	if b.Path.Binary != "" {
		binary = b.Path.Binary
	}
	dir := filepath.Join(b.dir, fmt.Sprintf("node%d", i))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	socket := filepath.Join(dir, "vrouter.sock")
	args := []string{binary, "--socket", socket, "--state-dir", dir, "--attach", b.Path.Attach}
	if b.Path.IO != "" {
		args = append(args, "--io", b.Path.IO)
	}
	if b.Path.NoBPF {
		args = append([]string{"setpriv", "--bounding-set", "-all,+net_admin,+net_raw"}, args...)
	}
	node := b.nodes[i-1]
	d, err := b.start(node, exec.Command(args[0], args[1:]...))
	if err != nil {
		return err
	}
	b.vrouters = append(b.vrouters, d)
	if d.client, err = rpc.Dial(socket); err != nil {
		return err
	}
	err = d.await(ctx, "vrouter", func() error {
		_, err := d.client.Status(ctx)
		return err
	})
	if err != nil {
		return err
	}
	if err := b.program(ctx, d.client, i); err != nil {
		return err
	}
	err = node.Do(func() error {
		return errors.Join(linkUp("vr0", ownAddress(i)+"/32"), route("vr0", pool, "", ownAddress(i)))
	})
	if err != nil || b.Path.Attach != "direct" {
		return err
	}
	return d.await(ctx, "the pod's interface", func() error {
		s, err := d.client.Status(ctx)
		if err == nil && !strings.Contains(s.Port, fmt.Sprintf("%[1]d of %[1]d pods ", s.Pods)) {
			err = errors.New(s.Port)
		}
		return err
	})
}

// program tells node i's vRouter what the agent would.
func (b *Bed) program(ctx context.Context, c *rpc.Client, i int) error {
	other := 3 - i
	node := func(i int) netip.Addr { return netip.MustParseAddr(nodeAddress(i)) }
	if _, err := c.Begin(ctx); err != nil {
		return err
	}
	pods := []rpc.Pod{{Address: netip.MustParseAddr(podAddress(i)), Interface: cali(i)}}
	if b.Shape == Local {
		pods = append(pods, rpc.Pod{Address: b.target(), Interface: cali(2)})
	}
	err := c.Update(ctx, rpc.Update{
		Config:   &rpc.Config{NodeAddress: node(i), Underlay: "eth0", MTU: underlayMTU - 20},
		AddNodes: []netip.Addr{node(i), node(other)},
		AddPods:  pods,
		Set: []rpc.Route{
			{Prefix: netip.MustParsePrefix(podBlock(i)), NextHop: rpc.Local()},
			{Prefix: netip.MustParsePrefix(podBlock(other)), NextHop: rpc.Tunnel(node(other))},
		},
	})
	if err != nil {
		return err
	}
	_, err = c.End(ctx)
	return err
}

// Describe says how the vRouters of the bed carry packets, in their own words; nothing for a peer.
func (b *Bed) Describe(ctx context.Context) (string, error) {
	if len(b.vrouters) == 0 {
		return "", nil
	}
	s, err := b.vrouters[0].client.Status(ctx)
	return s.Port, err
}

// Counters returns what node i's vRouter has counted, without the zeroes; nothing for a peer.
func (b *Bed) Counters(ctx context.Context, i int) (map[string]uint64, error) {
	if len(b.vrouters) < i {
		return nil, nil
	}
	list, err := b.vrouters[i-1].client.Counters(ctx)
	if err != nil {
		return nil, err
	}
	out := make(map[string]uint64)
	for _, c := range list {
		if c.Packets != 0 {
			out[c.Name] = c.Packets
		}
	}
	return out, nil
}

// PIDs are the processes of the path itself: what they use counts as forwarding.
func (b *Bed) PIDs() []int {
	var out []int
	for _, d := range slices.Concat(b.vrouters, b.carriers) {
		out = append(out, d.cmd.Process.Pid)
	}
	return out
}
