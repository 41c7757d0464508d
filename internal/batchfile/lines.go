// Package batchfile is the file side of signing a batch: reading lines of claims
// that may be anything, and writing tokens to a file so that a run that is killed
// at any moment can be continued.
package batchfile

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
)

// MaxLine is the longest line in bytes, its end not counted. Longer ones are
// read over without being held.
const MaxLine = 1 << 20

// ErrTooLong is the error of a line that is longer than MaxLine.
var ErrTooLong = fmt.Errorf("the line is longer than %d bytes", MaxLine)

// Line is one line of input.
type Line struct {
	Number int    // from 1
	Text   []byte // without its end; valid until the next line
	Err    error  // ErrTooLong, or nil
}

// Lines reads input line by line. A line ends with LF or CR LF, the last one
// also with the input; blank lines are passed over; a UTF-8 byte order mark at
// the very beginning is, too. What cannot be read ends the sequence, and failed
// is told why.
func Lines(input io.Reader, failed func(error)) iter.Seq[Line] {
	return func(yield func(Line) bool) {
		r := bufio.NewReaderSize(input, 64<<10)
		var line []byte
		for number := 1; ; number++ {
			var err error
			line, err = readLine(r, line[:0])
			ended := errors.Is(err, io.EOF)
			if number == 1 {
				line = bytes.TrimPrefix(line, []byte("\uFEFF"))
			}
			switch {
			case errors.Is(err, ErrTooLong):
				if !yield(Line{Number: number, Err: err}) {
					return
				}
			case err != nil && !ended:
				failed(err)
				return
			case len(bytes.TrimSpace(line)) > 0:
				if !yield(Line{Number: number, Text: line}) {
					return
				}
			}
			if ended {
				return
			}
		}
	}
}

// readLine appends a line to buf. With io.EOF comes the last one, which may be
// empty; with ErrTooLong comes nothing.
func readLine(r *bufio.Reader, buf []byte) ([]byte, error) {
	tooLong := false
	for {
		part, err := r.ReadSlice('\n')
		if len(buf)+len(part) > MaxLine+len("\r\n") {
			tooLong, buf = true, buf[:0]
		}
		if !tooLong {
			buf = append(buf, part...)
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case err != nil && !errors.Is(err, io.EOF):
			return nil, err
		}
		buf = bytes.TrimSuffix(bytes.TrimSuffix(buf, []byte("\n")), []byte("\r"))
		if tooLong || len(buf) > MaxLine {
			return buf[:0], errors.Join(ErrTooLong, err)
		}
		return buf, err
	}
}

// Count is the number of lines that Lines would yield.
func Count(input io.Reader) (int, error) {
	var failed error
	n := 0
	for range Lines(input, func(err error) { failed = err }) {
		n++
	}
	return n, failed
}
