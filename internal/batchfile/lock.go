package batchfile

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
)

// The one who writes an output holds a lock on its unfinished file, and only the one
// who holds it renames or removes that.

// openLocked opens an unfinished output and keeps other processes away from it. The
// lock ends with the file.
func openLocked(path string, flag int) (*os.File, error) {
	for {
		file, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOFOLLOW|flag, 0o600)
		if err != nil {
			return nil, err
		}
		if err = lock(file); err == nil {
			err = checkName(file, path)
		}
		if err == nil {
			return file, nil
		}
		err = errors.Join(err, file.Close())
		if !errors.Is(err, ErrReplaced) { // if it is, who had the lock finished or gave up
			return nil, err
		}
	}
}

func lock(file *os.File) error {
	err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return fmt.Errorf("%s: %w", file.Name(), ErrInUse)
	}
	return err
}

// checkName makes sure that a path still names a file.
func checkName(file *os.File, path string) error {
	held, err := file.Stat()
	if err != nil {
		return err
	}
	named, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(held, named) {
		return fmt.Errorf("%s: %w", path, ErrReplaced)
	}
	return err
}

// openUnfinished opens what an earlier run left unfinished. An empty file is none: a
// process that was killed before its first token left that, and it is removed.
func openUnfinished(path string) (*os.File, error) {
	file, err := openLocked(path, 0)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	switch {
	case err != nil:
	case !info.Mode().IsRegular():
		err = fmt.Errorf("%s is %w", path, ErrNoFile)
	case info.Size() == 0:
		err = cmp.Or(os.Remove(path), fs.ErrNotExist)
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}
