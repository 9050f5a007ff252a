package api

import (
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
)

// maxReply bounds what one answer may hold, in bytes, captures excepted.
const maxReply = 16 << 20

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
	return st, c.ask(ctx, http.MethodGet, StatusPath, nil, &st)
}

// Trace asks what would become of a packet at the agent's node.
func (c *Client) Trace(ctx context.Context, req TraceRequest) (s Segment, err error) {
	return s, c.ask(ctx, http.MethodPost, TracePath, req, &s)
}

// Drops asks what was dropped, with the samples whose number is greater than since.
func (c *Client) Drops(ctx context.Context, since uint64) (d Drops, err error) {
	return d, c.ask(ctx, http.MethodGet, DropsPath+"?since="+strconv.FormatUint(since, 10), nil, &d)
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
	lines := json.NewDecoder(resp.Body)
	for {
		var line Captured
		if err := lines.Decode(&line); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return fmt.Errorf("%s %w any more: the capture has ended", c.name, ErrUnreachable)
			}
			return fmt.Errorf("%s: %w", c.name, err)
		}
		if line.Error != "" {
			return fmt.Errorf("%s: %s", c.name, line.Error)
		}
		if err := got(line); err != nil {
			return err
		}
	}
}

// ask makes one request and decodes the answer into reply.
func (c *Client) ask(ctx context.Context, method, path string, body, reply any) error {
	resp, err := c.do(ctx, method, path, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxReply)).Decode(reply); err != nil {
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
