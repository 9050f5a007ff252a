// Package embeddedtest gives the tests of a package one etcd server to share.
package embeddedtest

import (
	"context"
	"fmt"
	"os"
	"testing"

	"margay/datastore/embedded"
)

// Main runs a package's tests beside a server of their own, and returns the exit code; endpoint is set to the server's
// URL before they start. Server and data are gone when it returns. Use it as
//
//	func TestMain(m *testing.M) { os.Exit(embeddedtest.Main(m, &endpoint)) }
func Main(m *testing.M, endpoint *string) int {
	dir, err := os.MkdirTemp("", "margay-etcd")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ready, ended := make(chan string, 1), make(chan error, 1)
	go func() {
		ended <- embedded.Serve(ctx, embedded.Config{Dir: dir, ClientURLs: []string{"http://127.0.0.1:0"}, NoSync: true,
			Ready: func(urls []string) { ready <- urls[0] }})
	}()
	select {
	case *endpoint = <-ready:
	case err := <-ended:
		fmt.Fprintln(os.Stderr, "etcd for the tests:", err)
		return 1
	}
	code := m.Run()
	cancel()
	if err := <-ended; err != nil {
		fmt.Fprintln(os.Stderr, "etcd for the tests:", err)
		return 1
	}
	return code
}
