package agent

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

// TestStrangersTakeNothing: who does not hold the token, however often he asks, leaves the others their questions.
func TestStrangersTakeNothing(t *testing.T) {
	g := &tokenGuard{token: "right", loaded: time.Now().Add(time.Hour)}
	h := g.protect(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "answer") }))
	ask := func(token string) *http.Response {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.Header.Set("Authorization", "Bearer "+token)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w.Result()
	}
	codes := map[int]int{}
	for range 5 * diagBurst {
		resp := ask("wrong")
		codes[resp.StatusCode]++
		if resp.Header.Get("Connection") != "close" {
			t.Fatal("a stranger keeps his connection")
		}
	}
	if codes[http.StatusTooManyRequests] == 0 || codes[http.StatusUnauthorized] < diagBurst || len(codes) != 2 {
		t.Errorf("strangers got %v", codes)
	}
	for i := range diagBurst {
		if resp := ask("right"); resp.StatusCode != http.StatusOK {
			t.Fatalf("question %d: %s", i, resp.Status)
		}
	}
	for range 5 * diagBurst {
		codes[ask("right").StatusCode]++
	}
	if codes[http.StatusOK] > 2*diagBurst {
		t.Errorf("%d questions were answered at once", codes[http.StatusOK])
	}
}

// TestOneAddressHasItsShare: the connections of one address do not fill the server's.
func TestOneAddressHasItsShare(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := newLimitedListener(inner)
	accepted := make(chan net.Conn, diagConnections)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				close(accepted)
				return
			}
			accepted <- c
		}
	}()
	dial := func(from string) net.Conn {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		c, err := d.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	var held []net.Conn
	for range diagOneAddress {
		dial("127.0.0.1")
		held = append(held, <-accepted)
	}
	refused := dial("127.0.0.1")
	if err := refused.SetReadDeadline(time.Now().Add(60 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := refused.Read(make([]byte, 1)); err == nil || isTimeout(err) {
		t.Errorf("one more: %v", err)
	}
	dial("127.0.0.2")
	(<-accepted).Close()
	held[0].Close()
	dial("127.0.0.1")
	(<-accepted).Close()
	inner.Close()
	if _, open := <-accepted; open {
		t.Error("a connection too many")
	}
	for _, c := range held {
		c.Close()
	}
	if len(l.slots) != 0 || len(l.from) != 0 {
		t.Errorf("%d slots, %v are still taken", len(l.slots), l.from)
	}
}

func isTimeout(err error) bool {
	e, ok := err.(net.Error)
	return ok && e.Timeout()
}
