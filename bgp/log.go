package bgp

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
)

// logHandler stands between GoBGP and our log. GoBGP tells each step of each session at Info: what an operator should
// see of that this package logs itself, so Info becomes Debug. On the way it picks up why a session does not come up,
// which GoBGP says nowhere else.
type logHandler struct {
	next  slog.Handler
	peer  netip.Addr // from the Key attribute that GoBGP gives each peer's logger
	fault func(peer netip.Addr, reason string)
}

// Enabled implements slog.Handler. Everything is wanted: the reasons in question come at Debug.
func (h *logHandler) Enabled(context.Context, slog.Level) bool { return true }

// Handle implements slog.Handler.
func (h *logHandler) Handle(ctx context.Context, r slog.Record) error {
	if h.peer.IsValid() {
		if reason := faultIn(r); reason != "" {
			h.fault(h.peer, reason)
		}
	}
	if r.Level == slog.LevelInfo {
		r.Level = slog.LevelDebug
	}
	if !h.next.Enabled(ctx, r.Level) {
		return nil
	}
	r.Message = "gobgp: " + r.Message
	return h.next.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h *logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	n := *h
	for _, a := range attrs {
		if a.Key == "Key" {
			if addr, err := netip.ParseAddr(a.Value.String()); err == nil {
				n.peer = addr
			}
		}
	}
	n.next = h.next.WithAttrs(attrs)
	return &n
}

// WithGroup implements slog.Handler.
func (h *logHandler) WithGroup(name string) slog.Handler {
	n := *h
	n.next = h.next.WithGroup(name)
	return &n
}

// faultIn returns why a session failed, when the record tells that. A message that a later GoBGP words differently
// costs a reason in the status, nothing more.
func faultIn(r slog.Record) string {
	attr := func(key string) (v slog.Value, ok bool) {
		r.Attrs(func(a slog.Attr) bool {
			if a.Key == key {
				v, ok = a.Value, true
			}
			return !ok
		})
		return v, ok
	}
	switch r.Message {
	case "failed to connect":
		if v, ok := attr("Error"); ok {
			return v.String()
		}
	case "outgoing connection IO error":
		// A peer that does not know us yet accepts the connection and closes it.
		return "the peer closed the connection before its OPEN"
	case "sent notification", "received notification":
		code, ok1 := attr("Code")
		sub, ok2 := attr("Subcode")
		if ok1 && ok2 && code.Kind() == slog.KindInt64 && sub.Kind() == slog.KindInt64 {
			return fmt.Sprintf("%s: %s", r.Message, notificationText(code.Int64(), sub.Int64()))
		}
	}
	return ""
}
