// Command hsmkey signs and verifies JSON Web Tokens with keys that never leave
// a hardware security module, and manages these keys. See docs/cli.md.
package main

import (
	"context"
	"io"
	"os"
	"os/signal"
	"syscall"
)

func main() { os.Exit(process(os.Stdout, os.Stderr)) }

// process runs the program in its process. The first Ctrl-C asks it to end, the
// second ends it.
func process(stdout, stderr io.Writer) int {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	go func() { // beside what follows: it takes a while
		notified, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
		<-notified.Done()
		stop()
		cancel(context.Cause(notified))
	}()
	return run(ctx, os.Args[1:], os.Stdin, stdout, stderr)
}
