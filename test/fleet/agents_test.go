package fleet

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/agent/api"
	"margay/datastore"
	"margay/vrouter/packet"
)

// character is what an agent is like.
type character int

const (
	good   character = iota
	dead             // nobody listens
	silent           // nothing comes back, not even a refusal
	mute             // it takes the connection and says nothing
	slow             // it answers after two seconds
	liar             // what it answers is no answer
	flood            // its answer never ends
	other            // it has another certificate than the datastore says
	chatty           // it captures as many packets as are taken from it
)

// The agents' addresses, and those behind which there is nothing.
var (
	here    = netip.MustParsePrefix("198.18.0.0/16")
	nowhere = netip.MustParsePrefix("198.19.0.0/16")
)

const token = "the cluster's token"

// agents are those of n nodes: one server, which has all their addresses.
type agents struct {
	n    int
	like func(i int) character
	port uint16
	stop chan struct{} // closed when the test is over

	mine, stranger atomic.Pointer[tls.Certificate] // the one that the datastore has, and another
	asked          []atomic.Int64                  // by node: connections and questions
	captures       atomic.Int64                    // that run
	given          atomic.Int64                    // captured packets, by the chatty ones

	mu    sync.Mutex
	conns map[net.Conn]bool
}

func name(i int) string { return fmt.Sprintf("node%04d", i) }

func (a *agents) address(i int) netip.Addr {
	base := here
	if a.like(i) == silent {
		base = nowhere
	}
	b := base.Addr().As4()
	b[2], b[3] = byte((i+1)>>8), byte(i+1)
	return netip.AddrFrom4(b)
}

// startAgents serves n agents, and writes their nodes, blocks and pods into the datastore.
func startAgents(t *testing.T, e *etcd, n int, like func(i int) character) *agents {
	t.Helper()
	a := &agents{n: n, like: like, asked: make([]atomic.Int64, n), stop: make(chan struct{}), conns: map[net.Conn]bool{}}
	a.mine.Store(certificate(t))
	a.stranger.Store(certificate(t))
	if err := network(); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp4", ":0")
	if err != nil {
		t.Fatal(err)
	}
	a.port = l.Addr().(*net.TCPAddr).AddrPort().Port()
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+api.DropsPath, a.handle(a.serveDrops))
	mux.HandleFunc("GET "+api.CapturePath, a.handle(a.serveCapture))
	mux.HandleFunc("POST "+api.TracePath, a.handle(a.serveTrace))
	srv := &http.Server{Handler: mux, ErrorLog: log.New(io.Discard, "", 0), ConnState: a.track,
		TLSConfig: &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: a.certificateFor}}
	var served sync.WaitGroup
	served.Go(func() { _ = srv.ServeTLS(l, "", "") })
	t.Cleanup(func() { close(a.stop); _ = srv.Close(); served.Wait() })
	a.register(t, e.open(t))
	return a
}

// network is the tests' own: everything in here is this machine's, and nowhere leads to a device that swallows all.
var network = sync.OnceValue(func() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	hole := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "hole"}, PeerName: "bottom"} // which is down
	if err := netlink.LinkAdd(hole); err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(nowhere.Addr().String() + "/16")
	if err != nil {
		return err
	}
	ours := &netlink.Route{LinkIndex: lo.Attrs().Index, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: unix.RT_SCOPE_HOST,
		Dst: &net.IPNet{IP: here.Addr().AsSlice(), Mask: net.CIDRMask(here.Bits(), 32)}}
	return errors.Join(netlink.AddrAdd(hole, addr), netlink.LinkSetARPOff(hole), netlink.LinkSetUp(hole), netlink.RouteAdd(ours))
})

func (a *agents) track(c net.Conn, s http.ConnState) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch s {
	case http.StateNew:
		a.conns[c] = true
	case http.StateClosed, http.StateHijacked:
		delete(a.conns, c)
	}
}

// restart is what callers see of it: their connections are gone, and the agents have another certificate.
func (a *agents) restart(t *testing.T) {
	a.mine.Store(certificate(t))
	a.mu.Lock()
	defer a.mu.Unlock()
	for c := range a.conns {
		_ = c.Close()
	}
}

// which agent an address of this machine belongs to.
func (a *agents) which(at net.Addr) int {
	b := at.(*net.TCPAddr).AddrPort().Addr().Unmap().As4()
	return int(b[2])<<8 + int(b[3]) - 1
}

func (a *agents) certificateFor(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	i := a.which(hello.Conn.LocalAddr())
	a.asked[i].Add(1)
	switch a.like(i) {
	case mute:
		<-a.stop
		return nil, errors.New("the test is over")
	case other:
		return a.stranger.Load(), nil
	}
	return a.mine.Load(), nil
}

// handle does what all questions have in common.
func (a *agents) handle(f func(w http.ResponseWriter, r *http.Request, i int)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		i := a.which(r.Context().Value(http.LocalAddrContextKey).(net.Addr))
		if r.Header.Get("Authorization") != "Bearer "+token {
			http.Error(w, "another token", http.StatusUnauthorized)
			return
		}
		switch a.like(i) {
		case slow:
			select {
			case <-time.After(2 * time.Second):
			case <-r.Context().Done():
				return
			}
		case liar:
			_, _ = io.WriteString(w, "\x00\xff<html>{]")
			return
		case flood:
			chunk := bytes.Repeat([]byte("x"), 64<<10)
			_, _ = io.WriteString(w, `{"node":"`)
			for err := error(nil); err == nil; {
				_, err = w.Write(chunk)
			}
			return
		}
		f(w, r, i)
	}
}

// serveDrops has one packet dropped between two questions: so many as it has been asked for, and the last one is the sample.
func (a *agents) serveDrops(w http.ResponseWriter, r *http.Request, i int) {
	n := a.asked[i].Load()
	_ = json.NewEncoder(w).Encode(api.Drops{Node: name(i),
		Counters: []api.Counter{{By: "vrouter", Reason: "no_route", Packets: uint64(n), Bytes: 28 * uint64(n)}},
		Flows:    []api.DropFlow{{Reason: "no_route", Source: pod(i), Destination: pod(i + 1), Packets: uint64(n), Bytes: 28 * uint64(n)}},
		Samples:  []api.DropSample{{Number: uint64(n), Time: time.Now(), Direction: "encap", Reason: "no_route", Length: 28, Packet: datagram(i)}}})
}

// serveCapture gives one packet, and then nothing, or all that are taken.
func (a *agents) serveCapture(w http.ResponseWriter, r *http.Request, i int) {
	a.captures.Add(1)
	defer a.captures.Add(-1)
	enc := json.NewEncoder(w)
	_ = enc.Encode(api.Captured{})
	packet := api.Captured{Time: time.Now(), Port: "vr0", Direction: "encap", Forwarded: true, Sent: 1, Length: 28, Packet: datagram(i)}
	_ = enc.Encode(packet)
	_ = http.NewResponseController(w).Flush()
	for a.like(i) == chatty {
		if enc.Encode(packet) != nil {
			return
		}
		a.given.Add(1)
	}
	select {
	case <-r.Context().Done():
	case <-a.stop:
	}
}

// stalled reports whether nobody takes captured packets any more, for half a second.
func (a *agents) stalled() bool {
	before := a.given.Load()
	time.Sleep(500 * time.Millisecond)
	return a.given.Load() == before
}

// serveTrace delivers what is for the node's own pod, and forwards everything else to the node of its destination.
func (a *agents) serveTrace(w http.ResponseWriter, r *http.Request, i int) {
	var req api.TraceRequest
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s := api.Segment{Node: name(i), Address: a.address(i), Outcome: api.Delivered, Via: "cali0", Packet: req.Packet,
		Rungs: []api.Rung{{By: "vrouter", Name: "route to the destination", Passed: true}}}
	if to := owner(netip.AddrFrom4([4]byte(req.Packet[16:20]))); to != i {
		s.Outcome, s.Next = api.Forwarded, a.address(to)
	}
	_ = json.NewEncoder(w).Encode(s)
}

// datagram is an empty one from a node's pod to another's.
func datagram(i int) []byte {
	b := make([]byte, 28)
	b[0], b[3], b[8], b[9], b[25] = 0x45, 28, 64, 17, 8
	copy(b[12:], pod(i).AsSlice())
	copy(b[16:], pod(i+1).AsSlice())
	binary.BigEndian.PutUint16(b[10:], packet.Checksum(b[:20], 0))
	return b
}

// block returns a node's block, pod the first address in it, and owner whose block an address is in.
func block(i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 10), byte(i >> 2), byte(i << 6)}), 26)
}
func pod(i int) netip.Addr { return block(i).Addr().Next() }
func owner(a netip.Addr) int {
	b := a.As4()
	return int(b[1])<<10 | int(b[2])<<2 | int(b[3])>>6
}

const resources = "/calico/resources/v3/projectcalico.org/"

// endpoint is what a node's agent writes into the datastore when it starts.
func (a *agents) endpoint(t *testing.T, i int) []byte {
	t.Helper()
	at := netip.AddrPortFrom(a.address(i), a.port)
	if a.like(i) == dead {
		at = netip.AddrPortFrom(a.address(i), 1)
	}
	b, err := json.Marshal(api.Endpoint{Address: at, Certificate: a.mine.Load().Certificate[0]})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// register writes the cluster: for each node a Node, the agent's endpoint, and a block with one pod.
func (a *agents) register(t *testing.T, s *datastore.Store) {
	t.Helper()
	ops := []datastore.Op{
		datastore.OpCreate(api.DiagToken, []byte(token)),
		datastore.OpCreate(resources+"clusterinformations/default", []byte(`{"kind":"ClusterInformation","apiVersion":"projectcalico.org/v3","metadata":{"name":"default"},"spec":{"clusterGUID":"g","datastoreReady":true}}`)),
		datastore.OpCreate(resources+"ippools/pool", []byte(`{"kind":"IPPool","apiVersion":"projectcalico.org/v3","metadata":{"name":"pool"},"spec":{"cidr":"10.0.0.0/8","ipipMode":"Always","natOutgoing":true}}`)),
	}
	free := strings.Repeat(",null", 62)
	for i := range a.n {
		cidr, key := block(i), strings.ReplaceAll(block(i).String(), "/", "-")
		ops = append(ops,
			datastore.OpCreate(api.DiagNodes+name(i), a.endpoint(t, i)),
			datastore.OpCreate(resources+"nodes/"+name(i), fmt.Appendf(nil,
				`{"kind":"Node","apiVersion":"projectcalico.org/v3","metadata":{"name":%q},"spec":{"bgp":{"ipv4Address":"%s/16","ipv4IPIPTunnelAddr":%q}}}`,
				name(i), a.address(i), cidr.Addr())),
			datastore.OpCreate("/calico/ipam/v2/host/"+name(i)+"/ipv4/block/"+key, []byte(`{"state":"confirmed","deleted":false}`)),
			datastore.OpCreate("/calico/ipam/v2/handle/tunnel-"+name(i), fmt.Appendf(nil, `{"block":{%q:1},"deleted":false}`, cidr)),
			datastore.OpCreate("/calico/ipam/v2/handle/pod-"+name(i), fmt.Appendf(nil, `{"block":{%q:1},"deleted":false}`, cidr)),
			datastore.OpCreate("/calico/ipam/v2/assignment/ipv4/block/"+key, fmt.Appendf(nil,
				`{"cidr":%q,"affinity":"host:%s","allocations":[0,1%s],"unallocated":[],"attributes":[`+
					`{"handle_id":"tunnel-%[2]s","secondary":{"node":%[2]q,"type":"ipipTunnelAddress"}},`+
					`{"handle_id":"pod-%[2]s","secondary":{"node":%[2]q,"namespace":"default","pod":"pod-%[2]s"}}],"deleted":false}`,
				cidr, name(i), free)))
	}
	for batch := range slices.Chunk(ops, 120) { // etcd takes 128 at once
		if _, err := s.Txn(t.Context(), batch...); err != nil {
			t.Fatal(err)
		}
	}
}

func certificate(t *testing.T) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
