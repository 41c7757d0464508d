package batchfile

import (
	"bufio"
	"bytes"
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

// Errors of outputs.
var (
	ErrUnfinished = errors.New("an earlier run did not finish")
	ErrInUse      = errors.New("another process is writing it")
	ErrReplaced   = errors.New("somebody else removed or replaced it")
)

// Output is a file of tokens, one a line, that gets its real name when it is
// complete. What is no regular file is none ([ErrNoFile]). The life of one: Create or Resume; Tokens; Begin; Write; and either
// Finish or Abandon.
type Output struct {
	name     string   // where no symbolic link is left
	file     *os.File // where tokens are, or go
	finished bool     // file is an output that an earlier run finished
	complete int64    // size of the lines in file that are complete
	torn     bool     // there is something behind them
	writer   *bufio.Writer
}

func newOutput(name string) (*Output, error) {
	path, err := locate(name)
	if err != nil {
		return nil, err
	}
	return &Output{name: path}, nil
}

// Create begins an output. It fails with [ErrUnfinished] if there is an
// unfinished one, and with [ErrInUse] if that is being written. An output of that
// name that is finished is replaced in the end.
func Create(name string) (*Output, error) {
	o, err := newOutput(name)
	if err == nil {
		err = o.create()
	}
	if err != nil {
		return nil, err
	}
	return o, nil
}

func (o *Output) create() error {
	for {
		file, err := openLocked(o.partial(), os.O_CREATE|os.O_EXCL)
		if err == nil {
			o.file = file
		}
		if !errors.Is(err, fs.ErrExist) {
			return err
		}
		file, err = openUnfinished(o.partial())
		if err == nil {
			return errors.Join(fmt.Errorf("%w: %s is there", ErrUnfinished, o.partial()), file.Close())
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
}

// Resume opens what an earlier run left: the unfinished output, else the
// finished one, else nothing. It changes nothing yet. It fails with [ErrInUse] if
// the earlier run still goes on.
func Resume(name string) (*Output, error) {
	o, err := newOutput(name)
	if err != nil {
		return nil, err
	}
	file, err := openUnfinished(o.partial())
	if errors.Is(err, fs.ErrNotExist) {
		file, err = os.Open(o.name)
		o.finished = true
	}
	if errors.Is(err, fs.ErrNotExist) {
		return Create(name)
	}
	if err != nil {
		return nil, err
	}
	o.file = file
	if err := o.findEnd(); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return o, nil
}

// partial is the name while the output is not finished.
func (o *Output) partial() string { return o.name + Suffix }

// findEnd finds the end of the last complete line: a process that is killed may
// leave a part of one.
func (o *Output) findEnd() error {
	info, err := o.file.Stat()
	if err != nil {
		return err
	}
	defer func() { o.torn = o.complete < info.Size() }()
	block := make([]byte, 64<<10)
	for end := info.Size(); end > 0; {
		start := max(end-int64(len(block)), 0)
		part := block[:end-start]
		if _, err := o.file.ReadAt(part, start); err != nil {
			return err
		}
		if at := bytes.LastIndexByte(part, '\n'); at >= 0 {
			o.complete = start + int64(at) + 1
			break
		}
		end = start
	}
	return nil
}

// Size is how many bytes of tokens the output holds already.
func (o *Output) Size() int64 { return o.complete }

// Finished reports whether the output is one that an earlier run finished. It is
// not if its last line is torn.
func (o *Output) Finished() bool { return o.finished && !o.torn }

// Tokens are the tokens that the output holds already.
func (o *Output) Tokens() *Lines {
	return NewLines(io.NewSectionReader(o.file, 0, o.complete), MaxToken)
}

// Begin makes the output ready for more tokens: a last line that is torn goes,
// and a finished output is copied.
func (o *Output) Begin() error {
	if o.finished {
		old := o.file
		if err := o.create(); err != nil {
			return err
		}
		defer func() { _ = old.Close() }() // it was only read
		o.finished = false
		if _, err := io.Copy(o.file, io.NewSectionReader(old, 0, o.complete)); err != nil {
			return err
		}
	}
	if err := o.file.Truncate(o.complete); err != nil {
		return err
	}
	if _, err := o.file.Seek(o.complete, io.SeekStart); err != nil {
		return err
	}
	o.writer = bufio.NewWriterSize(o.file, 64<<10)
	return nil
}

// Write appends a token.
func (o *Output) Write(token string) error {
	if _, err := o.writer.WriteString(token); err != nil {
		return err
	}
	return o.writer.WriteByte('\n')
}

// Finish makes sure that the tokens are on the disk, and gives the file its
// name. What is finished already stays as it is.
func (o *Output) Finish() error {
	if o.finished {
		return o.file.Close()
	}
	err := errors.Join(o.writer.Flush(), o.file.Sync())
	if err == nil {
		err = checkName(o.file, o.partial())
	}
	if err == nil {
		err = os.Rename(o.partial(), o.name)
	}
	// The lock is held until the file has its name.
	if err := errors.Join(err, o.file.Close()); err != nil {
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

// Abandon keeps what there is for a later Resume. An output without a token
// leaves nothing behind. It reports the name of the unfinished output, if any.
func (o *Output) Abandon() (kept string, err error) {
	if o.finished {
		return "", o.file.Close()
	}
	if o.writer != nil {
		err = o.writer.Flush()
	}
	if named := checkName(o.file, o.partial()); named != nil {
		return "", errors.Join(err, named, o.file.Close())
	}
	info, statErr := o.file.Stat()
	if statErr == nil && info.Size() == 0 {
		return "", errors.Join(err, os.Remove(o.partial()), o.file.Close())
	}
	return o.partial(), errors.Join(err, statErr, o.file.Close())
}
