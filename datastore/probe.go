package datastore

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
)

// greeting is how an HTTP/2 client begins (RFC 9113 3.4): the preface and an empty SETTINGS frame.
const greeting = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"

// probe connects to all endpoints at once and is content with the first that works. The gRPC client alone would only
// say "deadline exceeded" where this says "connection refused" or "certificate signed by unknown authority".
func probe(ctx context.Context, endpoints []string, tlsConfig *tls.Config) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan error, len(endpoints))
	for _, e := range endpoints {
		go func() { results <- probeOne(ctx, e, tlsConfig) }()
	}
	var first error
	for range endpoints {
		err := <-results
		if err == nil {
			return nil
		}
		if first == nil {
			first = err
		}
	}
	return first
}

// probeOne goes as far as the server's first bytes of HTTP/2: that a client certificate was refused is said only then.
func probeOne(ctx context.Context, endpoint string, tlsConfig *tls.Config) error {
	u, err := url.Parse(endpoint)
	if err != nil {
		return err
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", u.Host)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	if u.Scheme == "https" {
		c := tlsConfig.Clone()
		c.ServerName, c.NextProtos = u.Hostname(), []string{"h2"}
		secure := tls.Client(conn, c)
		if err := secure.HandshakeContext(ctx); err != nil {
			return fmt.Errorf("tls handshake: %w", err)
		}
		conn = secure
	}
	if _, err := io.WriteString(conn, greeting); err != nil {
		return answerError(ctx, u.Scheme, err)
	}
	var head [9]byte // of the server's first frame
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		return answerError(ctx, u.Scheme, err)
	}
	if bytes.HasPrefix(head[:], []byte("HTTP/1")) || head[0] == 21 { // 21: a TLS alert
		return answerError(ctx, u.Scheme, errNotPlain)
	}
	return nil
}

// errNotPlain says that a server did not understand plain HTTP/2.
var errNotPlain = errors.New("it does not speak plain HTTP/2: expected https:// for a server with TLS")

// answerError words what came instead of an answer.
func answerError(ctx context.Context, scheme string, err error) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case scheme == "https":
		// A server that refuses the client's certificate says so in an alert.
		return fmt.Errorf("tls handshake: %w", err)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return errNotPlain
	}
	return err
}
