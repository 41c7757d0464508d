package main

// The rules of output:
//
//   - Standard output is for data: what another program reads. It is written when
//     the command has succeeded; after a failure it is empty, but for the report of
//     doctor, which is about failures, and the tokens of batch, which come as they go.
//   - Everything else goes to standard error: what was done, warnings, questions,
//     logs.
//   - A failure is one line that begins with "hsmkey: ", and where there is
//     something to be done about it one more, that begins with "hint: ".
//   - JSON is on one line; `| jq` makes it pretty.
//   - No output of either kind has a PIN, a secret or a private key in it, or
//     anything that an HSM or a token's sender could steer a terminal with.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode"

	"golang.org/x/term"
)

// print writes data.
func (a *app) print(data []byte) error {
	if _, err := a.stdout.Write(data); err != nil {
		return fmt.Errorf("writing the output: %w", err)
	}
	return nil
}

// printLine writes one line of data.
func (a *app) printLine(line string) error { return a.print([]byte(line + "\n")) }

// printJSON writes a value as one line of JSON.
func (a *app) printJSON(value any) error {
	var line bytes.Buffer
	encoder := json.NewEncoder(&line)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(value); err != nil {
		return fmt.Errorf("writing the output: %w", err)
	}
	return a.print(line.Bytes())
}

// note tells the person something that is not data.
func (a *app) note(format string, args ...any) {
	fmt.Fprintln(a.stderr, plain(fmt.Sprintf(format, args...)))
}

// report tells of the failure of a command, if there is one, and returns the exit
// status.
func (a *app) report(command string, err error) int {
	if err == nil {
		return exitOK
	}
	fmt.Fprintln(a.stderr, "hsmkey: "+plain(message(err)))
	if hint := hintFor(command, err); hint != "" {
		fmt.Fprintln(a.stderr, "hint: "+plain(hint))
	}
	return exitStatus(err)
}

// asTerminal returns the terminal that a stream is, or nil.
func asTerminal(stream io.Writer) *os.File {
	if file, ok := stream.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
		return file
	}
	return nil
}

// width is how many columns standard output has.
func (a *app) width() int {
	const usual = 80
	terminal := asTerminal(a.stdout)
	if terminal == nil {
		return usual
	}
	width, _, err := term.GetSize(int(terminal.Fd()))
	if err != nil || width <= 0 {
		return usual
	}
	return width
}

// plain puts text on one line and takes out what steers a terminal.
func plain(text string) string {
	text = strings.ReplaceAll(strings.TrimSpace(text), "\n", "; ")
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, text)
}

// hinted is an error with advice.
type hinted struct {
	error
	hint string
}

func (h *hinted) Unwrap() error { return h.error }

// withHint adds advice to an error that has none yet.
func withHint(err error, format string, args ...any) error {
	if err == nil || errors.As(err, new(*hinted)) {
		return err
	}
	return &hinted{err, fmt.Sprintf(format, args...)}
}

// lineWriter is for logs: it makes each of them plain.
type lineWriter struct{ to io.Writer }

func (w lineWriter) Write(line []byte) (int, error) {
	if _, err := fmt.Fprintln(w.to, plain(string(line))); err != nil {
		return 0, err
	}
	return len(line), nil
}
