// Package packet owns what the data plane knows about bytes: header views, checksums, the IP-in-IP push and pop,
// the splitting of superpackets, fragments, and ICMP errors.
//
// Everything here is a pure function over the caller's memory. Nothing allocates, blocks or reads a clock, and no
// function keeps a slice after it has returned. Views ([IPv4]) share memory with the packet that they were parsed
// from: whoever owns the packet's buffer owns the view.
//
// Packets from the network enter through [ParseIPv4], which is the only place where they are validated. The other
// functions say which of that they rely on. A fast path wants verdicts and not error values, so they answer with a
// [Fault], whose zero value is "none".
//
// Start reading at ipv4.go (the view), then ipip.go (the tunnel), segment.go (superpackets) and checksum.go; then what a
// router needs beside: fragment.go, icmp.go and mss.go.
package packet
