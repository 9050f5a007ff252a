// Package suite runs the scenarios of the benchmark over paths, ours and the peers', in turn and in rounds, and gathers what
// they measure. Start reading at run.go; scenarios.go has what is measured.
package suite
