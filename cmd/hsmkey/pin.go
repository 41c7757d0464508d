package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// promptPIN asks the person at the terminal, once: the PIN is kept for as long
// as the process runs. Nothing is asked before a login is due.
func (a *app) promptPIN(tokenLabel string) sessionpool.PINSource {
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
		a.catchSignals() // the echo has to come back
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
	defer func() {
		_ = term.Restore(fd, before) // a terminal that is gone needs no echo
		fmt.Fprintln(tty)
	}()
	// After Ctrl-Z and fg the terminal is as the shell likes it, with echo.
	continued := make(chan os.Signal, 1)
	signal.Notify(continued, syscall.SIGCONT)
	defer signal.Stop(continued)
	if err := askOn(tty, prompt); err != nil {
		return "", err
	}

	type answer struct {
		line string
		err  error
	}
	answered := make(chan answer, 1)
	go func() {
		line, err := bufio.NewReader(tty).ReadString('\n')
		answered <- answer{line, err}
	}()
	for {
		select {
		case a := <-answered:
			if errors.Is(a.err, io.EOF) {
				return "", nil // Ctrl-D: nothing that is to be sent
			}
			if a.err != nil {
				return "", fmt.Errorf("%w: asking on the terminal: %w", hsmkey.ErrPIN, a.err)
			}
			return strings.TrimSuffix(a.line, "\n"), nil
		case <-continued:
			if err := askOn(tty, "\r"+prompt); err != nil {
				return "", err
			}
		case <-ctx.Done():
			// The read goes on until the process ends.
			return "", context.Cause(ctx)
		}
	}
}

// askOn switches the echo off, and then asks: who sees the question may type. The
// terminal still makes lines, erases, and turns Ctrl-C into a signal.
func askOn(tty *os.File, prompt string) error {
	fd := int(tty.Fd())
	mode, err := unix.IoctlGetTermios(fd, getTermios)
	if err == nil {
		mode.Iflag |= unix.ICRNL
		mode.Lflag = mode.Lflag&^unix.ECHO | unix.ICANON | unix.ISIG
		err = unix.IoctlSetTermios(fd, setTermios, mode)
	}
	if err != nil {
		return fmt.Errorf("%w: asking on the terminal: %w", hsmkey.ErrPIN, err)
	}
	fmt.Fprint(tty, prompt)
	return nil
}
