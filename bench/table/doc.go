// Package table is what can be measured of the forwarding without any network: the loop over in-memory ports, lookups in
// several forms of the table, updates with readers, loading the full table. `make bench` runs it, and so does
// `go test -bench . ./bench/table`; the tests run each once, so that none rots.
package table
