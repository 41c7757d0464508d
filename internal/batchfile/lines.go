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

// The longest lines in bytes, their ends not counted: of claims, and of tokens, in
// which claims grow by a third, and header, signature and added claims come on top.
const (
	MaxLine  = 1 << 20
	MaxToken = 2 * MaxLine
)

// TooLongError is the error of a line that is longer than so many bytes.
type TooLongError int

func (e TooLongError) Error() string { return fmt.Sprintf("the line is longer than %d bytes", int(e)) }

// Line is one line of input.
type Line struct {
	Number int    // from 1
	Text   []byte // without its end; valid until the next line
	Err    error  // a TooLongError, then there is no text; or nil
}

// Lines reads input line by line. A line ends with LF or CR LF, the last one
// also with the input; blank lines are passed over; a UTF-8 byte order mark at
// the very beginning is, too. Lines that are too long are read over without being
// held.
type Lines struct {
	reader *bufio.Reader
	most   int
	buffer []byte
	number int
	ended  bool
}

// NewLines returns the lines of an input; most is the length of the longest in
// bytes.
func NewLines(input io.Reader, most int) *Lines {
	return &Lines{reader: bufio.NewReaderSize(input, 64<<10), most: most}
}

// Next returns the next line, or io.EOF after the last one, or why the input
// cannot be read.
func (l *Lines) Next() (Line, error) {
	for !l.ended {
		err := l.read()
		l.number++
		l.ended = errors.Is(err, io.EOF)
		switch {
		case errors.As(err, new(TooLongError)):
			return Line{Number: l.number, Err: TooLongError(l.most)}, nil
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
// empty; with a TooLongError comes nothing.
func (l *Lines) read() error {
	tooLong := false
	for l.buffer = l.buffer[:0]; ; {
		part, err := l.reader.ReadSlice('\n')
		tooLong = tooLong || len(l.buffer)+len(part) > l.most+len("\r\n")
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
		if tooLong || len(l.buffer) > l.most {
			return errors.Join(TooLongError(l.most), err)
		}
		return err
	}
}
