package bgp

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
)

// dialAs connects to s from one of its peers' addresses.
func dialAs(t *testing.T, s *Speaker, from string) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: time.Second}
	var conn net.Conn
	eventually(t, func() (err error) {
		conn, err = d.Dial("tcp", netip.AddrPortFrom(s.cfg.Listen, uint16(s.cfg.Port)).String())
		return err
	})
	t.Cleanup(func() { conn.Close() })
	return conn
}

// establish speaks as the peer 127.7.3.2 until its session is up.
func establish(t *testing.T, s *Speaker) net.Conn {
	t.Helper()
	var conn net.Conn
	eventually(t, func() error {
		if conn != nil {
			conn.Close()
		}
		conn = dialAs(t, s, "127.7.3.2")
		open, err := bgp.NewBGPOpenMessage(64512, 90, netip.MustParseAddr("127.7.3.2"), []bgp.OptionParameterInterface{
			bgp.NewOptionParameterCapability([]bgp.ParameterCapabilityInterface{bgp.NewCapMultiProtocol(bgp.RF_IPv4_UC), bgp.NewCapFourOctetASNumber(64512)}),
		})
		if err != nil {
			t.Fatal(err)
		}
		send(t, conn, open)
		send(t, conn, bgp.NewBGPKeepAliveMessage())
		deadline := time.Now().Add(time.Second)
		for time.Now().Before(deadline) {
			if s.Peers()[0].State == "Established" {
				return nil
			}
			time.Sleep(10 * time.Millisecond)
		}
		return errors.New("state " + s.Peers()[0].State)
	})
	return conn
}

func send(t *testing.T, conn net.Conn, m *bgp.BGPMessage) {
	t.Helper()
	b, err := m.Serialize()
	if err != nil {
		t.Fatal(err)
	}
	// A connection that was refused meanwhile shows in the state that the caller waits for.
	_, _ = conn.Write(b)
}

// message returns a BGP message of that type with a correct header.
func message(typ byte, body ...byte) []byte {
	n := 19 + len(body)
	return append(append(bytes.Repeat([]byte{0xff}, 16), byte(n>>8), byte(n), typ), body...)
}

// Whatever a configured peer sends, before its session is up or after, the speaker lives and takes the next session.
func TestHostilePeer(t *testing.T) {
	s := local(t, "127.7.3.1", nil)
	peer := []Peer{{Addr: netip.MustParseAddr("127.7.3.2"), AS: 64512, Passive: true}}
	afresh := func() { // without the idle time after a failure
		t.Helper()
		if err := errors.Join(s.SetPeers(t.Context(), nil), s.SetPeers(t.Context(), peer)); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			if p := s.Peers()[0]; p.State != "Active" {
				return errors.New(p.State)
			}
			return nil
		})
	}
	for _, garbage := range [][]byte{
		bytes.Repeat([]byte{0}, 64),
		bytes.Repeat([]byte{0xff}, 64),
		message(1),
		message(1, 4, 0xfc, 0, 0, 90, 127, 7, 3, 2, 255),
		message(9),
		message(2, 0, 0, 0, 0),
	} {
		afresh()
		conn := dialAs(t, s, "127.7.3.2")
		_, _ = conn.Write(garbage)
		_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		_, _ = io.Copy(io.Discard, conn) // until the speaker closes it
		conn.Close()
	}
	for name, garbage := range map[string][]byte{
		"unknown type":             message(9),
		"no header":                bytes.Repeat([]byte{0}, 19),
		"withdraw too long":        message(2, 0xff, 0xff),
		"attribute too long":       message(2, 0, 0, 0, 4, 0x40, 1, 255, 0),
		"prefix of 33 bits":        message(2, 0, 0, 0, 0, 33, 10, 0, 0, 0, 0),
		"prefix without attribute": message(2, 0, 0, 0, 0, 24, 10, 0, 0),
		"notification, empty":      message(3),
		"route refresh, empty":     message(5),
	} {
		afresh()
		conn := establish(t, s)
		if _, err := conn.Write(garbage); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		_ = conn.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		_, _ = io.Copy(io.Discard, conn)
		conn.Close()
		eventually(t, func() error {
			if p := s.Peers()[0]; p.State == "Established" || p.LastError == "" {
				return errors.New(name + ": " + p.State)
			}
			return nil
		})
		if b := s.Best(); len(b) != 0 {
			t.Errorf("%s: routes %v", name, b)
		}
	}
	afresh()
	establish(t, s)
}

// A peer without graceful restart has sent all it will say when its session is up, and keeps nothing when it is gone.
func TestPeerWithoutGracefulRestart(t *testing.T) {
	s := local(t, "127.7.3.1", func(c *Config) { c.Port = 17903 })
	if err := s.SetPeers(t.Context(), []Peer{{Addr: netip.MustParseAddr("127.7.3.2"), AS: 64512, Passive: true}}); err != nil {
		t.Fatal(err)
	}
	conn := establish(t, s)
	select {
	case <-s.Synced():
	case <-time.After(patience):
		t.Fatal("not synced")
	}
	// 192.0.2.0/24: origin IGP, empty AS path, next hop, local preference 200, community 64512:7.
	if _, err := conn.Write(message(2, 0, 0, 0, 28,
		0x40, 1, 1, 0, 0x40, 2, 0, 0x40, 3, 4, 127, 7, 3, 9, 0x40, 5, 4, 0, 0, 0, 200, 0xc0, 8, 4, 0xfc, 0, 0, 7, 24, 192, 0, 2)); err != nil {
		t.Fatal(err)
	}
	prefix := netip.MustParsePrefix("192.0.2.0/24")
	eventually(t, func() error {
		if p, ok := s.Best()[prefix]; !ok || p.LocalPref != 200 || len(p.Communities) != 1 || p.Communities[0] != 64512<<16|7 ||
			p.NextHop != netip.MustParseAddr("127.7.3.9") || p.Stale {
			return errors.New("not learned: " + s.Peers()[0].LastError)
		}
		return nil
	})
	conn.Close()
	eventually(t, func() error {
		if len(s.Best()) != 0 || s.Peers()[0].Restarting {
			return errors.New("route kept")
		}
		return nil
	})
}

// What gets through GoBGP's parser must get through ours.
func FuzzPathFrom(f *testing.F) {
	f.Add([]byte{0, 0, 0, 14, 0x40, 1, 1, 0, 0x40, 2, 0, 0x40, 3, 4, 10, 0, 0, 1, 24, 192, 0, 2}, true)
	f.Add([]byte{0, 4, 24, 192, 0, 2, 0, 0}, false)
	f.Add([]byte{0, 0, 0, 20, 0x40, 1, 1, 0, 0x40, 2, 6, 2, 1, 0, 0, 0xfd, 0xea, 0x80, 14, 4, 0, 1, 1, 0}, true)
	f.Fuzz(func(t *testing.T, body []byte, withdraw bool) {
		if len(body) > 4077 {
			return
		}
		h := &bgp.BGPHeader{Type: bgp.BGP_MSG_UPDATE, Len: uint16(19 + len(body))}
		m, err := bgp.ParseBGPBody(h, body)
		if err != nil || m == nil {
			return
		}
		u := m.Body.(*bgp.BGPUpdate)
		for _, n := range append(u.NLRI, u.WithdrawnRoutes...) {
			prefix, path, ok := pathFrom(&apiutil.Path{Nlri: n.NLRI, Attrs: u.PathAttributes, Withdrawal: withdraw})
			if ok && (prefix != prefix.Masked() || !withdraw && !path.NextHop.IsValid()) {
				t.Errorf("%v %+v", prefix, path)
			}
		}
	})
}
