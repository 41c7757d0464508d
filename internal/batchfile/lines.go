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
	Err    error  // ErrTooLong, then there is no text; or nil
}

// Lines reads input line by line. A line ends with LF or CR LF, the last one
// also with the input; blank lines are passed over; a UTF-8 byte order mark at
// the very beginning is, too.
type Lines struct {
	reader *bufio.Reader
	buffer []byte
	number int
	ended  bool
}

// NewLines returns the lines of an input.
func NewLines(input io.Reader) *Lines {
	return &Lines{reader: bufio.NewReaderSize(input, 64<<10)}
}

// Next returns the next line, or io.EOF after the last one, or why the input
// cannot be read.
func (l *Lines) Next() (Line, error) {
	for !l.ended {
		err := l.read()
		l.number++
		l.ended = errors.Is(err, io.EOF)
		switch {
		case errors.Is(err, ErrTooLong):
			return Line{Number: l.number, Err: ErrTooLong}, nil
		case err != nil && !l.ended:
			return Line{}, err
		}
		text := l.buffer
		if l.number == 1 {
			text = bytes.TrimPrefix(text, []byte("\uFEFF"))
		}
		if len(bytes.TrimSpace(text)) > 0 {
			return Line{Number: l.number, Text: text}, nil
		}
	}
	return Line{}, io.EOF
}

// read fills the buffer with a line. With io.EOF comes the last one, which may be
// empty; with ErrTooLong comes nothing.
func (l *Lines) read() error {
	const most = MaxLine + len("\r\n")
	tooLong := false
	for l.buffer = l.buffer[:0]; ; {
		part, err := l.reader.ReadSlice('\n')
		tooLong = tooLong || len(l.buffer)+len(part) > most
		if !tooLong {
			l.buffer = append(l.buffer, part...)
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case err != nil && !errors.Is(err, io.EOF):
			return err
		}
		l.buffer = bytes.TrimSuffix(bytes.TrimSuffix(l.buffer, []byte("\n")), []byte("\r"))
		if tooLong || len(l.buffer) > MaxLine {
			return errors.Join(ErrTooLong, err)
		}
		return err
	}
}
