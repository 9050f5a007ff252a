package ctl

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"time"

	"margay/agent/api"
)

// TestNodeStatusPathMTUs: what was learned about the way to a node is shown with its age.
func TestNodeStatusPathMTUs(t *testing.T) {
	learned := time.Unix(1e9, 0)
	st := api.Status{Node: "node1", VRouter: api.VRouter{Connected: true, PathMTUs: []api.PathMTU{
		{Node: netip.MustParseAddr("198.18.0.2"), MTU: 1400, Learned: learned, Age: 70, Expires: learned.Add(10 * time.Minute)},
	}}}
	var out bytes.Buffer
	printNodeStatus(&out, st)
	if want := "Path MTU to 198.18.0.2: 1400, learned 1m10s ago, tried again in 8m50s.\n"; !strings.Contains(out.String(), want) {
		t.Errorf("%s\nexpected %q", out.String(), want)
	}
	out.Reset()
	st.VRouter.PathMTUs = nil
	if printNodeStatus(&out, st); strings.Contains(out.String(), "Path MTU") {
		t.Error(out.String())
	}
}
