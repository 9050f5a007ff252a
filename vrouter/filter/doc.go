// Package filter is the part of the pcap filter language (pcap-filter(7)) that captures need, without libpcap: a text
// becomes a tree once, and the tree is asked about each packet, which begins with its IP header. What it answers is what
// libpcap answers for the same text on a file of link type RAW; docs/trace.md says which part of the language it is.
package filter
