package api

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// What an agent may make its caller hold, in bytes: one that is not what it should be must not fill the caller's memory.
const (
	maxReply = 16 << 20
	maxDrops = 4 << 20   // there are thousands who are asked for them; the flows and samples of 32 workers are a quarter of it
	maxLine  = 256 << 10 // of what is streamed: a packet of 64 KiB in base64 fits
)

// dialTimeout is how long a node has to take the connection: a lost packet is sent again after 1 s.
const dialTimeout = 3 * time.Second

// ErrUnreachable is wrapped by every error that means that no agent has answered.
var ErrUnreachable = errors.New("does not answer")

// Client asks one agent. Its methods are safe for concurrent use.
type Client struct {
	name  string // for errors
	base  string
	token string
	http  http.Client
}

// NewUnixClient returns a client for the agent of this node, on its unix socket.
func NewUnixClient(socket string) *Client {
	c := &Client{name: "margay-agent on " + socket, base: "http://agent"}
	c.http.Transport = &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}
	return c
}

// NewClient returns a client for another node's agent: whoever answers has to show the endpoint's own certificate.
func NewClient(node string, e Endpoint, token string) *Client {
	return &Client{name: "margay-agent of " + node, base: "https://" + e.Address.String(), token: token,
		http: http.Client{Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext:       (&net.Dialer{Timeout: dialTimeout}).DialContext,
			TLSClientConfig: &tls.Config{
				MinVersion: tls.VersionTLS13,
				// The certificate is known to the byte, and nobody else's would do: no name and no authority says more.
				InsecureSkipVerify: true,
				VerifyConnection: func(s tls.ConnectionState) error {
					if len(s.PeerCertificates) == 0 || !bytes.Equal(s.PeerCertificates[0].Raw, e.Certificate) {
						return errors.New("it shows another certificate than the datastore has for it")
					}
					return nil
				},
			},
		}}}
}

// Status asks for the agent's status.
func (c *Client) Status(ctx context.Context) (st Status, err error) {
	return st, c.ask(ctx, http.MethodGet, StatusPath, nil, &st, maxReply)
}

// Trace asks what would become of a packet at the agent's node.
func (c *Client) Trace(ctx context.Context, req TraceRequest) (s Segment, err error) {
	return s, c.ask(ctx, http.MethodPost, TracePath, req, &s, maxReply)
}

// Drops asks what was dropped, with the samples whose number is greater than since.
func (c *Client) Drops(ctx context.Context, since uint64) (d Drops, err error) {
	return d, c.ask(ctx, http.MethodGet, DropsPath+"?since="+strconv.FormatUint(since, 10), nil, &d, maxDrops)
}

// Capture calls got with each line of a capture until ctx is done or got returns an error, which Capture returns then. The
// first line has no packet: the capture runs.
func (c *Client) Capture(ctx context.Context, r CaptureRequest, got func(Captured) error) error {
	q := url.Values{"filter": {r.Filter}, "outer": {strconv.FormatBool(r.Outer)}, "snaplen": {strconv.Itoa(r.SnapLen)}}
	resp, err := c.do(ctx, http.MethodGet, CapturePath+"?"+q.Encode(), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	err = c.lines(resp.Body, func(text []byte) error {
		var line Captured
		if err := json.Unmarshal(text, &line); err != nil {
			return fmt.Errorf("%s: a line of the capture is not what this version expects: %w", c.name, err)
		}
		if line.Error != "" {
			return fmt.Errorf("%s: %s", c.name, line.Error)
		}
		return got(line)
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err == nil {
		return fmt.Errorf("%s %w any more: the capture has ended", c.name, ErrUnreachable)
	}
	return err
}

// lines calls got with each line of a stream until there are no more, which is no error, or got returns one. What comes behind the
// last end of a line is none.
func (c *Client) lines(from io.Reader, got func(text []byte) error) error {
	scan := bufio.NewScanner(from)
	scan.Buffer(nil, maxLine)
	scan.Split(func(data []byte, _ bool) (int, []byte, error) {
		if i := bytes.IndexByte(data, '\n'); i >= 0 {
			return i + 1, data[:i], nil
		}
		return 0, nil, nil
	})
	for scan.Scan() {
		if err := got(scan.Bytes()); err != nil {
			return err
		}
	}
	if err := scan.Err(); errors.Is(err, bufio.ErrTooLong) {
		return fmt.Errorf("%s: it sends lines of more than %d KiB, which no version does", c.name, maxLine>>10)
	}
	return nil
}

// ask makes one request and decodes the answer, of at most so many bytes, into reply.
func (c *Client) ask(ctx context.Context, method, path string, body, reply any, most int64) error {
	resp, err := c.do(ctx, method, path, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	limited := &io.LimitedReader{R: resp.Body, N: most}
	if err := json.NewDecoder(limited).Decode(reply); err != nil {
		if limited.N == 0 {
			return fmt.Errorf("%s: the answer is longer than %d MiB, which no version's is", c.name, most>>20)
		}
		return fmt.Errorf("%s: the answer is not what this version expects: %w", c.name, err)
	}
	return nil
}

func (c *Client) do(ctx context.Context, method, path string, body any) (*http.Response, error) {
	var content io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		content = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, content)
	if err != nil {
		return nil, err
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		cause := err
		if u := (*url.Error)(nil); errors.As(err, &u) {
			cause = u.Err // without the URL, which says nothing to who gave a node's name
		}
		return nil, fmt.Errorf("%s %w: %w", c.name, ErrUnreachable, cause)
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		text, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
		if err != nil || len(bytes.TrimSpace(text)) == 0 {
			text = []byte(resp.Status)
		}
		return nil, fmt.Errorf("%s: %s", c.name, bytes.TrimSpace(text))
	}
	return resp, nil
}
