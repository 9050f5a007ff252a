// Command margayctl operates a Margay cluster.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"margay/ctl"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends at once what the first one does not
	code := ctl.Main(ctx, os.Args[1:], os.Stderr)
	stop()
	os.Exit(code)
}
