// Command hsmkey signs and verifies JSON Web Tokens with keys that never leave
// a hardware security module, and manages these keys. See docs/cli.md.
package main

import (
	"context"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

func main() {
	growStack()
	os.Exit(process(os.Stdout, os.Stderr))
}

// growStack makes the stack as large as a command needs it while nothing is on it yet.
// Else it grows several times, and each time all frames on it are looked up and moved.
//
//go:noinline
func growStack() {
	var room [24 << 10]byte
	fill(&room)
}

//go:noinline
func fill(*[24 << 10]byte) {}

// process runs the program in its process.
func process(stdout, stderr io.Writer) int {
	scatter()
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	catch := sync.OnceFunc(func() { catchSignals(cancel) })
	if os.Getpid() == 1 {
		catch() // the first process of a container does not die of a signal
	}
	return run(ctx, os.Args[1:], os.Stdin, stdout, stderr, catch)
}

// catchSignals makes the first Ctrl-C ask the program to end; the second ends it.
func catchSignals(cancel context.CancelCauseFunc) {
	caught, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(caught, func() {
		stop()
		cancel(context.Cause(caught))
	})
}
