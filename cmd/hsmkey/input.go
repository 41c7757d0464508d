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
		return a.readStdin(maxInput)
	}
	return readFile(flag, name)
}

func (a *app) readStdin(limit int) ([]byte, error) {
	data, err := readBounded(a.stdin, "standard input", limit)
	return data, withHint(err, "standard input can be a file or a pipe")
}

func readFile(flag, name string) ([]byte, error) {
	f, err := os.Open(name)
	if err == nil {
		defer func() { _ = f.Close() }()
		var data []byte
		if data, err = readBounded(f, name, maxInput); err == nil {
			return data, nil
		}
	}
	return nil, withHint(fmt.Errorf("%s: %w", flag, err), "is that the path of a file, and may you read it?")
}

func readBounded(from io.Reader, name string, limit int) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(from, int64(limit)+1))
	if err != nil {
		return nil, err // it names what was read
	}
	if len(data) > limit {
		return nil, withHint(fmt.Errorf("%s is longer than %d bytes", name, limit), "tokens are for claims and small payloads; sign a digest of large ones")
	}
	return data, nil
}

// stdinIsTerminal reports whether a person would have to type the input.
func (a *app) stdinIsTerminal() bool { return term.IsTerminal(int(a.stdin.Fd())) }
