package batchfile

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// Suffix is what the name of an unfinished output ends with. It stands beside
// the output, so that finishing it is one rename.
const Suffix = ".partial"

// ErrUnfinished says that an earlier run left an unfinished output.
var ErrUnfinished = errors.New("an earlier run did not finish")

// Output is a file of tokens, one a line, that gets its real name when it is
// complete.
type Output struct {
	name string
	file *os.File
	w    *bufio.Writer

	// Written is the number of tokens that the file held when it was opened, and
	// Last the last of them.
	Written int
	Last    string
}

// Create begins an output. It fails with [ErrUnfinished] if there is an
// unfinished one. An output of that name that is finished is replaced in the end.
func Create(name string) (*Output, error) {
	file, err := os.OpenFile(name+Suffix, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("%w: %s is there", ErrUnfinished, name+Suffix)
	}
	if err != nil {
		return nil, err
	}
	return &Output{name: name, file: file, w: bufio.NewWriterSize(file, 64<<10)}, nil
}

// Resume opens what an earlier run left: the unfinished output, else the
// finished one, else nothing. A last line without its end is cut off: it was
// being written when the run was killed.
func Resume(name string) (*Output, error) {
	if _, err := os.Lstat(name + Suffix); errors.Is(err, fs.ErrNotExist) {
		switch err := os.Rename(name, name+Suffix); {
		case errors.Is(err, fs.ErrNotExist):
			return Create(name)
		case err != nil:
			return nil, err
		}
	}
	file, err := os.OpenFile(name+Suffix, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	o := &Output{name: name, file: file}
	if err := o.recover(); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	o.w = bufio.NewWriterSize(file, 64<<10)
	return o, nil
}

// recover counts the complete lines, and cuts off what comes after them.
func (o *Output) recover() error {
	info, err := o.file.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", o.file.Name())
	}
	r := bufio.NewReaderSize(o.file, 64<<10)
	var line, last []byte
	var complete int64
	for {
		part, err := r.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case errors.Is(err, io.EOF):
			o.Last = string(last)
			if err := o.file.Truncate(complete); err != nil {
				return err
			}
			_, err := o.file.Seek(complete, io.SeekStart)
			return err
		case err != nil:
			return err
		}
		complete += int64(len(line))
		o.Written++
		last = append(last[:0], line[:len(line)-1]...)
		line = line[:0]
	}
}

// Write appends a token.
func (o *Output) Write(token string) error {
	if _, err := o.w.WriteString(token); err != nil {
		return err
	}
	return o.w.WriteByte('\n')
}

// Finish makes sure that the tokens are on the disk, and gives the file its
// name.
func (o *Output) Finish() error {
	if err := errors.Join(o.w.Flush(), o.file.Sync(), o.file.Close()); err != nil {
		return err
	}
	if err := os.Rename(o.name+Suffix, o.name); err != nil {
		return err
	}
	return syncDir(filepath.Dir(o.name))
}

// syncDir makes a rename last.
func syncDir(name string) error {
	dir, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// Abandon keeps what was written for a later Resume. An output without a token
// leaves nothing behind.
func (o *Output) Abandon() (kept bool, err error) {
	err = o.w.Flush()
	info, statErr := o.file.Stat()
	err = errors.Join(err, statErr, o.file.Close())
	if statErr == nil && info.Size() == 0 {
		return false, errors.Join(err, os.Remove(o.name+Suffix))
	}
	return true, err
}
