package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"
)

// DefaultTimeout is how long a verb may take in all when its context has no deadline. Runtimes give up after minutes;
// the agent gives up a little earlier than this, so that its error arrives.
const DefaultTimeout = 60 * time.Second

// ErrUnreachable means that the agent did not take the request or died over it. What it was asked may have happened.
var ErrUnreachable = errors.New("margay-agent is not reachable")

// Call sends one request to the agent and returns its answer. netns, when not nil, goes along as an open file; the
// caller keeps owning it. A failure to talk wraps ErrUnreachable; an error of the agent's is in the response.
func Call(ctx context.Context, socket string, req *Request, netns *os.File) (*Response, error) {
	unreachable := func(err error) error {
		return fmt.Errorf("%w at %s: %w", ErrUnreachable, socket, err)
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, DefaultTimeout)
		defer cancel()
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, unreachable(err)
	}
	conn := c.(*net.UnixConn)
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return nil, unreachable(err)
		}
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Now()) })
	defer stop()

	data, err := json.Marshal(req)
	if err != nil {
		return nil, fmt.Errorf("encode request: %w", err)
	}
	if len(data) > MaxMessage {
		return nil, fmt.Errorf("request: %d bytes, expected at most %d", len(data), MaxMessage)
	}
	sent := 0
	if netns != nil {
		// The file rides on the first byte; a stream socket may take fewer bytes than offered, so the rest follows.
		if sent, _, err = conn.WriteMsgUnix(data, syscall.UnixRights(int(netns.Fd())), nil); err != nil {
			return nil, unreachable(err)
		}
	}
	if _, err := conn.Write(data[sent:]); err != nil {
		return nil, unreachable(err)
	}
	if err := conn.CloseWrite(); err != nil {
		return nil, unreachable(err)
	}
	resp := &Response{}
	if err := readMessage(conn, resp); err != nil {
		return nil, unreachable(fmt.Errorf("no answer: %w", err))
	}
	if resp.Protocol != Protocol && resp.Error == nil {
		return nil, unreachable(fmt.Errorf("answer in protocol %d, expected %d", resp.Protocol, Protocol))
	}
	return resp, nil
}
