// Package audit looks at a whole store and says what is wrong with its addresses. It is written apart from the
// allocator on purpose: it reads the JSON with types of its own and shares no code with package ipam, so that a mistake
// there is not repeated here. `margayctl ipam check` prints what it finds, and the simulations end with it.
//
// snapshot.go reads the store, audit.go compares, report.go is the report, in the form of calicoctl's.
package audit
