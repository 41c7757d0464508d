package main

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/term"
)

// maxInput bounds what is read of any file, and maxToken a token: the payload
// grows by a third in it.
const (
	maxInput = 1 << 20
	maxToken = 2 << 20
)

// readInput reads the file that a flag names, or standard input if that is "-".
func (a *app) readInput(flag, name string) ([]byte, error) {
	if name == "-" {
		return readBounded(a.stdin, "standard input", maxInput)
	}
	return readFile(flag, name)
}

func readFile(flag, name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, withHint(fmt.Errorf("%s: %w", flag, err), "is the path right, and may you read the file?")
	}
	defer func() { _ = f.Close() }()
	return readBounded(f, name, maxInput)
}

func readBounded(from io.Reader, name string, limit int) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(from, int64(limit)+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	if len(data) > limit {
		return nil, withHint(fmt.Errorf("%s is longer than %d bytes", name, limit), "tokens are for claims and small payloads; sign a digest of large ones")
	}
	return data, nil
}

// stdinIsTerminal reports whether a person would have to type the input.
func (a *app) stdinIsTerminal() bool { return term.IsTerminal(int(a.stdin.Fd())) }
