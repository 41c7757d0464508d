package batchfile

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// ErrNoFile is the error of a name that is not a file's and cannot become one: what
// stands there is a directory, a pipe or a device.
var ErrNoFile = errors.New("not a regular file")

// locate returns the path of the file that a name stands for, whether or not it is
// there. Symbolic links are followed, so that what they lead to is replaced, and the
// unfinished output stands beside that.
func locate(name string) (string, error) {
	switch info, err := os.Stat(name); {
	case err == nil && !info.Mode().IsRegular():
		return "", fmt.Errorf("%s is %w", name, ErrNoFile)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return "", err // a circle of links, too
	}
	dir, base := filepath.Split(name)
	if base == "" {
		return "", fmt.Errorf("%q is %w", name, ErrNoFile)
	}
	dir, err := filepath.EvalSymlinks(cmp.Or(dir, "."))
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, base)
	target, err := os.Readlink(path)
	switch {
	case err != nil: // it is no link
		return path, nil
	case filepath.IsAbs(target):
		return locate(target)
	}
	return locate(dir + string(filepath.Separator) + target)
}
