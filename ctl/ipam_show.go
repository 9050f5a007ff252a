package ctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/olekukonko/tablewriter"

	"margay/datastore"
	"margay/internal/version"
	"margay/ipam"
	"margay/ipam/audit"
)

// parseAddress reads an address that a user typed.
func parseAddress(text string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(text)
	if err != nil || addr.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("--ip %q: expected an IP address such as 10.244.0.5", text)
	}
	return addr.Unmap(), nil
}

// showAddress says who holds an address, in calicoctl's words.
func showAddress(ctx context.Context, w io.Writer, s *datastore.Store, text, output string) error {
	addr, err := parseAddress(text)
	if err != nil {
		return err
	}
	h, err := ipam.Lookup(ctx, s, addr)
	free := errors.Is(err, ipam.ErrNotAssigned)
	if err != nil && !free {
		return err
	}
	if output == "json" {
		out := struct {
			IP       string            `json:"ip"`
			Assigned bool              `json:"assigned"`
			Handle   string            `json:"handle,omitempty"`
			Attrs    map[string]string `json:"attributes,omitempty"`
			Block    string            `json:"block,omitempty"`
			Sequence uint64            `json:"sequenceNumber,omitempty"`
		}{addr.String(), !free, h.Handle, h.Attrs, "", h.Sequence}
		if !free {
			out.Block = h.Block.String()
		}
		return printJSON(w, out)
	}
	if free {
		fmt.Fprintf(w, "%s is not assigned\n", addr)
		return nil
	}
	fmt.Fprintf(w, "IP %s is in use\n", addr)
	if len(h.Attrs) == 0 {
		fmt.Fprintln(w, "No attributes defined")
		return nil
	}
	fmt.Fprintln(w, "Attributes:")
	for _, key := range slices.Sorted(maps.Keys(h.Attrs)) {
		fmt.Fprintf(w, "  %s: %s\n", key, h.Attrs[key])
	}
	return nil
}

// borrowedAddress is one row of --show-borrowed.
type borrowedAddress struct {
	IP            string `json:"ip"`
	BorrowingNode string `json:"borrowingNode"`
	Block         string `json:"block"`
	BlockOwner    string `json:"blockOwner"`
	Type          string `json:"type"`
	AllocatedTo   string `json:"allocatedTo"`
}

// showBorrowed lists addresses that are held on another node than their block's.
func showBorrowed(ctx context.Context, w io.Writer, s *datastore.Store, output string) error {
	report, err := audit.Look(ctx, s, version.String())
	if err != nil {
		return err
	}
	rows, unclassified := []borrowedAddress{}, 0
	for _, a := range report.Sorted() {
		switch {
		case a.CoolingDown:
		case a.Attrs["node"] == "":
			unclassified++
		case a.Borrowed:
			row := borrowedAddress{a.IP, a.Node, a.Block, a.BlockOwner, a.Type, ""}
			if a.Pod != "" {
				row.Type, row.AllocatedTo = "pod", a.Namespace+"/"+a.Pod
			}
			rows = append(rows, row)
		}
	}
	if output == "json" {
		return printJSON(w, rows)
	}
	table := tablewriter.NewWriter(w)
	table.SetHeader([]string{"IP", "BORROWING-NODE", "BLOCK", "BLOCK OWNER", "TYPE", "ALLOCATED-TO"})
	for _, r := range rows {
		table.Append([]string{r.IP, r.BorrowingNode, r.Block, r.BlockOwner, r.Type, r.AllocatedTo})
	}
	table.Render()
	if unclassified > 0 {
		fmt.Fprintf(w, "\nNote: found %d IP allocations without an explicit node association. Unable to determine if they are borrowed.\n", unclassified)
	}
	return nil
}

// showConfiguration prints calicoctl's table of the IPAM configuration.
func showConfiguration(ctx context.Context, w io.Writer, s *datastore.Store, output string) error {
	c, err := ipam.ReadConfig(ctx, s)
	if err != nil {
		return err
	}
	if output == "json" {
		return printJSON(w, c)
	}
	table := tablewriter.NewWriter(w)
	table.SetHeader([]string{"Property", "Value"})
	row := func(name string, value any) { table.Append([]string{name, fmt.Sprint(value)}) }
	row("StrictAffinity", c.StrictAffinity)
	row("AutoAllocateBlocks", c.AutoAllocateBlocks)
	row("MaxBlocksPerHost", c.MaxBlocksPerHost)
	if c.CooldownSeconds != 0 {
		row("IPCooldownSeconds", c.CooldownSeconds)
	}
	table.Render()
	return nil
}

// attrString writes an allocation's attributes as calicoctl does.
func attrString(a *audit.Allocation) string {
	handle := a.Handle
	if handle == "" {
		handle = "<none>"
	}
	var pairs []string
	for _, key := range slices.Sorted(maps.Keys(a.Attrs)) {
		pairs = append(pairs, key+"="+a.Attrs[key])
	}
	return fmt.Sprintf("Main:%s Extra:%s", handle, strings.Join(pairs, ","))
}
