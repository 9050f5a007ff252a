package cluster

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"
)

func pods(t *testing.T) (out []labPod) {
	for _, n := range status(t).Nodes {
		out = append(out, n.Pods...)
	}
	return out
}

func TestEveryPodReachesEveryPod(t *testing.T) {
	all := pods(t)
	if len(all) != 6 {
		t.Fatalf("expected 6 pods, got %+v", all)
	}
	collect(t, all, func(from labPod) error {
		for _, to := range all {
			if from.Name == to.Name {
				continue
			}
			if !reached(from.Netns, ip(t, to.Address)) {
				return fmt.Errorf("%s does not reach %s by ping", from.Name, to.Name)
			}
			if err := transfer(from, to, ip(t, to.Address)); err != nil {
				return fmt.Errorf("%s to %s by TCP: %w", from.Name, to.Name, err)
			}
		}
		return nil
	})
}

// transfer sends a few hundred full segments from one pod to another and back.
func transfer(from, to labPod, addr netip.Addr) error {
	l, err := listen(to.Netns, addr)
	if err != nil {
		return err
	}
	defer l.Close()
	return echoed(l, from.Netns, netip.MustParseAddrPort(l.Addr().String()))
}

// listen opens a TCP socket inside a namespace, on a port of the kernel's choice.
func listen(ns string, addr netip.Addr) (l net.Listener, err error) {
	err = enter(ns, func() (err error) { l, err = net.Listen("tcp4", addr.String()+":0"); return err })
	return l, err
}

// echoed dials to, which is to lead to l, from a namespace, and sends a few hundred full segments there and back.
func echoed(l net.Listener, from string, to netip.AddrPort) error {
	const size = 256 << 10
	served := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			served <- err
			return
		}
		defer c.Close()
		_, err = io.Copy(c, io.LimitReader(c, size))
		served <- err
	}()
	return enter(from, func() error {
		c, err := net.DialTimeout("tcp4", to.String(), patience)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		sent := make(chan error, 1)
		go func() { _, err := c.Write(make([]byte, size)); sent <- err }()
		if n, err := io.CopyN(io.Discard, c, size); err != nil {
			return fmt.Errorf("%d of %d bytes came back: %w", n, size, err)
		}
		if err := <-sent; err != nil {
			return err
		}
		return <-served
	})
}

func TestHostReachesRemotePodAndBack(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	if !reached(n1.Netns, ip(t, n2.Pods[0].Address)) {
		t.Error("node1's host does not reach a pod of node2")
	}
	tunnel := tunnelAddress(t, n1)
	if !reached(n2.Pods[0].Netns, tunnel) {
		t.Errorf("a pod of node2 does not reach node1's tunnel address %s", tunnel)
	}
	if !reached(n1.Netns, ip(t, n1.Pods[0].Address)) {
		t.Error("node1's host does not reach its own pod")
	}
}

// TestUnderlayCarriesOnlyIPIP looks at node1's wire while its pods talk to node2's.
func TestUnderlayCarriesOnlyIPIP(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	tap := onWire(t, 1)
	exchange(t, n1, n2)
	pool := netip.MustParsePrefix("10.244.0.0/16")
	a1, a2 := ip(t, n1.Address), ip(t, n2.Address)
	tunnelled := 0
	for _, s := range tap.all() {
		switch {
		case s.proto == 4 && pool.Contains(s.innerSrc) && pool.Contains(s.innerDst):
			if !(s.src == a1 && s.dst == a2 || s.src == a2 && s.dst == a1) {
				t.Errorf("protocol 4 from %s to %s, of which one is neither node", s.src, s.dst)
			}
			tunnelled++
		case pool.Contains(s.src) || pool.Contains(s.dst):
			t.Errorf("a pod's packet in clear: %+v", s)
		}
	}
	if tunnelled < 20 {
		t.Errorf("only %d tunnelled packets were seen", tunnelled)
	}
}

// TestDirectModesUseNoProtocol4 changes the pool under running pods, twice.
func TestDirectModesUseNoProtocol4(t *testing.T) {
	t.Cleanup(func() { setMode(t, "Always", "vr0") })
	for _, mode := range []string{"CrossSubnet", "Never"} {
		t.Run(mode, func(t *testing.T) {
			setMode(t, mode, "eth0")
			n1, n2 := node(t, 1), node(t, 2)
			exchange(t, n1, n2) // the vRouters know by now, too
			tap := onWire(t, 1)
			exchange(t, n1, n2)
			pool := netip.MustParsePrefix("10.244.0.0/16")
			clear := 0
			for _, s := range tap.all() {
				if s.proto == 4 {
					t.Errorf("protocol 4 on the underlay: %+v", s)
				}
				if pool.Contains(s.src) && pool.Contains(s.dst) {
					clear++
				}
			}
			if clear < 20 {
				t.Errorf("only %d packets between pods were seen", clear)
			}
		})
	}
}

// exchange has two nodes' pods talk by ping and TCP.
func exchange(t *testing.T, n1, n2 labNode) {
	t.Helper()
	a, b := n1.Pods[0], n2.Pods[0]
	if !reached(a.Netns, ip(t, b.Address)) || !reached(b.Netns, ip(t, a.Address)) {
		t.Fatalf("%s and %s do not reach each other", a.Name, b.Name)
	}
	if err := transfer(a, b, ip(t, b.Address)); err != nil {
		t.Fatalf("%s to %s by TCP: %v", a.Name, b.Name, err)
	}
}
