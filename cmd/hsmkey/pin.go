package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/term"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// promptPIN asks the person at the terminal, once: the PIN is kept for as long
// as the process runs. Nothing is asked before a login is due.
func promptPIN(tokenLabel string) sessionpool.PINSource {
	prompt := "PIN: "
	if tokenLabel != "" {
		prompt = fmt.Sprintf("PIN of token %q: ", plain(tokenLabel))
	}
	var once sync.Mutex
	var pin string
	return func(ctx context.Context) (string, error) {
		once.Lock()
		defer once.Unlock()
		if pin != "" {
			return pin, nil
		}
		var err error
		pin, err = askHidden(ctx, prompt)
		return pin, err
	}
}

// askHidden reads a line from the terminal without echo. It asks the terminal
// itself: standard input may hold the claims, standard output takes the token.
func askHidden(ctx context.Context, prompt string) (string, error) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return "", withHint(fmt.Errorf("%w: no PIN is configured, and there is no terminal to ask on", hsmkey.ErrPIN),
			"write it to a file of mode 0600 and name that with --pin-file or HSM_PIN_FILE")
	}
	defer func() { _ = tty.Close() }()
	fd := int(tty.Fd())
	before, err := term.GetState(fd)
	if err != nil {
		return "", fmt.Errorf("%w: asking on the terminal: %w", hsmkey.ErrPIN, err)
	}
	fmt.Fprint(tty, prompt)
	defer fmt.Fprintln(tty)

	type answer struct {
		line []byte
		err  error
	}
	answered := make(chan answer, 1)
	go func() {
		line, err := term.ReadPassword(fd)
		answered <- answer{line, err}
	}()
	select {
	case a := <-answered:
		if a.err != nil {
			return "", fmt.Errorf("%w: asking on the terminal: %w", hsmkey.ErrPIN, a.err)
		}
		return string(a.line), nil
	case <-ctx.Done():
		// The read goes on until the process ends; the echo must be back before.
		return "", errors.Join(context.Cause(ctx), term.Restore(fd, before))
	}
}
