// Package bench measures Margay beside its peers. Nothing imports it.
//
// What is here so far is the forwarding loop alone: in-memory ports, no system calls, the real ladder and table, with
// 1, 10,000 and 901,899 routes. `go test -bench . ./bench` runs it; the tests run each benchmark once, so that none rots.
package bench
