package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"margay/agent/api"
	"margay/datastore"
)

// What explains this node is served twice: on the agent's unix socket, and by TLS on the node's address, so that one
// margayctl can follow a packet from node to node. On TCP nobody is trusted for their address: who asks has to hold the
// cluster's token and who answers the certificate, and both are in the datastore alone. Nothing served here changes anything.

// The limits of what the network may ask: all who hold the token together, and apart from them all who do not, so that
// strangers take nothing from the operator.
const (
	diagConnections = 32
	diagOneAddress  = 16  // of the connections
	diagRate        = 100 // questions a second
	diagBurst       = 200
	diagBody        = 256 << 10 // bytes; a packet of 64 KiB in base64 fits
	// tokenPause is how often a token that does not fit makes the agent look for a new one.
	tokenPause = time.Second
)

// readRequest reads the body of a request into req. It is false when it has refused the request, what names it.
func readRequest(w http.ResponseWriter, r *http.Request, what string, req any) bool {
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, diagBody))
	dec.DisallowUnknownFields()
	if err := dec.Decode(req); err != nil {
		http.Error(w, what+": the request is not what this version expects: "+err.Error(), http.StatusBadRequest)
		return false
	}
	return true
}

// handleDiagnostics adds what explains this node.
func (a *Agent) handleDiagnostics(mux *http.ServeMux) {
	mux.HandleFunc("GET "+api.StatusPath, func(w http.ResponseWriter, _ *http.Request) { a.reply(w, a.status()) })
	mux.HandleFunc("POST "+api.TracePath, func(w http.ResponseWriter, r *http.Request) {
		var req api.TraceRequest
		if !readRequest(w, r, "trace", &req) {
			return
		}
		s, err := a.trace(r.Context(), req)
		if err != nil {
			http.Error(w, "trace: "+err.Error(), http.StatusBadRequest)
			return
		}
		a.reply(w, s)
	})
	mux.HandleFunc("GET "+api.DropsPath, func(w http.ResponseWriter, r *http.Request) {
		since, err := strconv.ParseUint(r.FormValue("since"), 10, 64)
		if err != nil {
			http.Error(w, fmt.Sprintf("since %q: expected a sample's number", r.FormValue("since")), http.StatusBadRequest)
			return
		}
		a.reply(w, a.drops(r.Context(), since))
	})
	mux.HandleFunc("GET "+api.CapturePath, a.serveCapture)
	a.handleProbe(mux)
}

func (a *Agent) reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(v); err != nil {
		a.log.Debug("answering a request", "err", err)
	}
}

// serveDiagnostics listens on the node's address and tells the datastore where, until ctx is done. An agent that cannot is
// as good a control plane as any: it is logged, and margayctl says that this node does not answer.
func (a *Agent) serveDiagnostics(ctx context.Context) {
	if a.cfg.DiagPort == 0 {
		return
	}
	if err := a.startDiagnostics(ctx); err != nil {
		a.log.Warn("other nodes' margayctl cannot ask this node: no trace, drops and captures across nodes", "err", err)
	}
}

func (a *Agent) startDiagnostics(ctx context.Context) error {
	self := a.underlay.Prefix.Addr()
	cert, err := selfSigned(a.cfg.Node, self)
	if err != nil {
		return err
	}
	guard := &tokenGuard{store: a.store}
	if err := guard.load(ctx); err != nil {
		return fmt.Errorf("the cluster's token: %w", err)
	}
	var lc net.ListenConfig
	at := netip.AddrPortFrom(self, uint16(a.cfg.DiagPort))
	l, err := lc.Listen(ctx, "tcp", at.String())
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	mux := http.NewServeMux()
	a.handleDiagnostics(mux)
	srv := &http.Server{Handler: guard.protect(mux), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10, ErrorLog: discardLog, BaseContext: func(net.Listener) context.Context { return ctx },
		TLSConfig: &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}}}
	context.AfterFunc(ctx, func() { _ = srv.Close() })
	go func() {
		err := srv.ServeTLS(newLimitedListener(l), "", "")
		if !errors.Is(err, http.ErrServerClosed) {
			a.log.Error("diagnostics server", "err", err)
		}
	}()
	e := api.Endpoint{Address: at, Certificate: cert.Certificate[0]}
	a.locked(func() { a.answers = e })
	if err := a.publish(ctx, e); err != nil {
		return err
	}
	a.log.Info("answers trace, drops and capture", "address", at)
	return nil
}

// publish writes this node's endpoint into the datastore.
func (a *Agent) publish(ctx context.Context, e api.Endpoint) error {
	value, err := json.Marshal(e)
	if err != nil {
		return err
	}
	key := api.DiagNodes + a.cfg.Node
	for {
		old, err := a.store.Get(ctx, key)
		switch {
		case errors.Is(err, datastore.ErrNotFound):
			_, err = a.store.Create(ctx, key, value)
		case err == nil:
			_, err = a.store.Update(ctx, key, value, old.Revision)
		}
		if !errors.Is(err, datastore.ErrConflict) && !errors.Is(err, datastore.ErrExists) {
			return err
		}
	}
}

// selfSigned makes the key of this process. It never touches a disk.
func selfSigned(node string, addr netip.Addr) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{CommonName: node},
		IPAddresses:  []net.IP{addr.AsSlice()},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().AddDate(10, 0, 0), // as long as the process, at most
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// tokenGuard lets through who holds the cluster's token, not too many at once.
type tokenGuard struct {
	store *datastore.Store

	mu     sync.Mutex
	token  string
	loaded time.Time

	holders, strangers questions
}

// questions is a token bucket.
type questions struct {
	saved float64 // that may be asked now
	last  time.Time
}

// load reads the token, and makes the cluster's first one.
func (g *tokenGuard) load(ctx context.Context) error {
	for {
		kv, err := g.store.Get(ctx, api.DiagToken)
		if errors.Is(err, datastore.ErrNotFound) {
			_, err = g.store.Create(ctx, api.DiagToken, []byte(rand.Text()+rand.Text()))
			if err == nil || errors.Is(err, datastore.ErrExists) {
				continue
			}
		}
		if err != nil {
			return err
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		g.token, g.loaded = strings.TrimSpace(string(kv.Value)), time.Now()
		return nil
	}
}

// protect refuses who does not know the token, and who asks too often. Who is refused loses the connection too.
func (g *tokenGuard) protect(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		known := g.knows(r)
		affords := g.afford(known)
		if known && affords {
			next.ServeHTTP(w, r)
			return
		}
		w.Header().Set("Connection", "close")
		if !affords {
			http.Error(w, "too many questions: ask again in a second", http.StatusTooManyRequests)
			return
		}
		http.Error(w, "the token is not the cluster's: it is in the datastore, for who may read it", http.StatusUnauthorized)
	})
}

// afford takes one question out of the bucket of those who know the token, or of the others.
func (g *tokenGuard) afford(known bool) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	q := &g.strangers
	if known {
		q = &g.holders
	}
	now := time.Now()
	if q.last.IsZero() {
		q.saved = diagBurst
	}
	q.saved = min(q.saved+now.Sub(q.last).Seconds()*diagRate, diagBurst)
	q.last = now
	if q.saved < 1 {
		return false
	}
	q.saved--
	return true
}

// knows checks the token; one that does not fit may be newer than ours.
func (g *tokenGuard) knows(r *http.Request) bool {
	given, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		return false
	}
	fits := func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.token != "" && subtle.ConstantTimeCompare([]byte(given), []byte(g.token)) == 1
	}
	if fits() {
		return true
	}
	g.mu.Lock()
	stale := time.Since(g.loaded) > tokenPause
	if stale {
		g.loaded = time.Now()
	}
	g.mu.Unlock()
	return stale && g.load(r.Context()) == nil && fits()
}

// limitedListener accepts no more connections at a time than it has slots, and closes at once what one address has beyond
// its share.
type limitedListener struct {
	net.Listener
	slots chan struct{}

	mu   sync.Mutex
	from map[netip.Addr]int // connections by their other end
}

func newLimitedListener(l net.Listener) *limitedListener {
	return &limitedListener{Listener: l, slots: make(chan struct{}, diagConnections), from: map[netip.Addr]int{}}
}

func (l *limitedListener) Accept() (net.Conn, error) {
	l.slots <- struct{}{}
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			<-l.slots
			return nil, err
		}
		var addr netip.Addr
		if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
			addr = a.AddrPort().Addr().Unmap()
		}
		if !l.enter(addr) {
			_ = c.Close()
			continue
		}
		return &slotConn{Conn: c, free: sync.OnceFunc(func() { l.leave(addr) })}, nil
	}
}

func (l *limitedListener) enter(a netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.from[a] >= diagOneAddress {
		return false
	}
	l.from[a]++
	return true
}

func (l *limitedListener) leave(a netip.Addr) {
	l.mu.Lock()
	if l.from[a]--; l.from[a] == 0 {
		delete(l.from, a)
	}
	l.mu.Unlock()
	<-l.slots
}

type slotConn struct {
	net.Conn
	free func()
}

func (c *slotConn) Close() error {
	defer c.free()
	return c.Conn.Close()
}

// serveCapture streams a capture of the vRouter, a line of JSON for each packet.
func (a *Agent) serveCapture(w http.ResponseWriter, r *http.Request) {
	outer, err := strconv.ParseBool(r.FormValue("outer"))
	snap, snapErr := strconv.Atoi(r.FormValue("snaplen"))
	if err != nil || snapErr != nil || snap < 0 {
		http.Error(w, "capture: outer: expected true or false; snaplen: expected a number", http.StatusBadRequest)
		return
	}
	if !a.isOpen() {
		http.Error(w, "capture: the agent is still starting", http.StatusServiceUnavailable)
		return
	}
	// It lasts as long as the caller likes: the limit on reading a request would end it.
	if err := http.NewResponseController(w).SetReadDeadline(time.Time{}); err != nil {
		a.log.Debug("capture", "err", err)
	}
	out := &captureWriter{w: w, flush: http.NewResponseController(w), enc: json.NewEncoder(w)}
	err = a.plane.client.Capture(r.Context(), captureOptions(r.FormValue("filter"), outer, snap), out.write)
	switch {
	case r.Context().Err() != nil:
	case !out.began:
		http.Error(w, "capture: "+err.Error(), http.StatusBadRequest)
	case err != nil:
		_ = out.enc.Encode(api.Captured{Error: err.Error()})
	default:
		_ = out.enc.Encode(api.Captured{Error: "the vRouter has ended the capture"})
	}
}

// discardLog takes what net/http would say about strangers, which is no news.
var discardLog = log.New(io.Discard, "", 0)
