package lab

import (
	"io"
	"net"
	"testing"
)

// Two labs may have the same addresses in namespaces of their own: a tunnel reaches the one that is meant.
func TestTunnelReachesItsOwnNamespace(t *testing.T) {
	for _, word := range []string{"one", "two"} {
		l, _ := wired(t, testHost(t), 1, 0)
		ns := netnsPath(underlayName(l.name))
		var ln net.Listener
		err := within(ns, func() (err error) {
			ln, err = net.Listen("tcp4", "198.18.0.254:2379")
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				_, _ = io.WriteString(c, word)
				c.Close()
			}
		}()
		way, err := newTunnel(ns, "198.18.0.254:2379")
		if err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("tcp4", way.listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(c); err != nil || string(got) != word {
			t.Errorf("got %q, %v; want %q", got, err, word)
		}
		c.Close()
		way.Close()
	}
}

func TestTunnelToNobodyEnds(t *testing.T) {
	l, _ := wired(t, testHost(t), 1, 0)
	way, err := newTunnel(netnsPath(underlayName(l.name)), "198.18.0.254:2379")
	if err != nil {
		t.Fatal(err)
	}
	defer way.Close()
	c, err := net.Dial("tcp4", way.listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if b, err := io.ReadAll(c); len(b) > 0 {
		t.Errorf("%q, %v", b, err)
	}
}
