package softhsm

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// Make returns the token in a directory, and makes it if there is none. made
// tells which. label is the token's; empty: the one that it has, for a new one
// DefaultLabel. An existing token is checked and, where it can be, repaired:
// permissions, and the configuration of a directory that was moved.
//
// A new token is made in a directory beside the final one, which is renamed when
// the token is complete. So a failure, or the end of ctx, leaves nothing behind,
// and what a killed process left is removed by the next. Of several that make
// the same token at once, one does and the others find it.
//
// module is the SoftHSM2 library. Make sets SOFTHSM2_CONF for the process while
// it uses it, and loads it, so that it is nothing for a process that uses
// SoftHSM2 otherwise.
//
// The error matches sessionpool.ErrConfig if the module is not SoftHSM2, the
// directory is not ours, or the token is another one.
func Make(ctx context.Context, dir, module, label string) (t Token, made bool, err error) {
	t.Dir, err = filepath.Abs(dir)
	if err != nil {
		return Token{}, false, err
	}
	if err := checkDir(t.Dir); err != nil {
		return Token{}, false, err
	}
	unlock, err := lock(ctx, filepath.Dir(t.Dir))
	if err != nil {
		return Token{}, false, err
	}
	defer unlock()
	t.Label = label

	entries, err := os.ReadDir(t.Dir)
	switch {
	case err == nil && len(entries) > 0:
		t, err = reuse(t, module)
		return t, false, err
	case err != nil && !os.IsNotExist(err):
		return Token{}, false, fmt.Errorf("%w: %w", sessionpool.ErrConfig, err)
	}
	if t.Label == "" {
		t.Label = DefaultLabel
	}
	return t, true, build(ctx, t, module)
}

// DefaultLabel is the label of a new token if none is given.
const DefaultLabel = "hsmkey-dev"

// lock keeps other processes from making tokens in the same parent directory.
// It leaves no file behind, and ends with the process.
func lock(ctx context.Context, parent string) (unlock func(), err error) {
	f, err := os.Open(parent)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", sessionpool.ErrConfig, err)
	}
	const retry = 20 * time.Millisecond
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			_ = f.Close()
			return nil, fmt.Errorf("locking %s: %w", parent, err)
		}
		select {
		case <-time.After(retry):
		case <-ctx.Done():
			_ = f.Close()
			return nil, fmt.Errorf("waiting for another one that makes a token in %s: %w", parent, context.Cause(ctx))
		}
	}
}

// reuse checks and repairs the token that is there.
func reuse(want Token, module string) (Token, error) {
	t, conf, err := read(want.Dir)
	if errors.Is(err, ErrNone) {
		return Token{}, fmt.Errorf("%w: %s has files in it that are not of a token made by hsmkey init (%w)", sessionpool.ErrConfig, want.Dir, err)
	}
	if err != nil {
		return Token{}, err
	}
	if want.Label != "" && want.Label != t.Label {
		return Token{}, fmt.Errorf("%w: %s holds the token %q, not %q", sessionpool.ErrConfig, t.Dir, t.Label, want.Label)
	}
	if err := CheckLabel(t.Label); err != nil {
		return Token{}, err
	}
	for _, path := range []string{t.PINFile(), t.soPINFile()} {
		pin, err := os.ReadFile(path)
		if err == nil && len(bytes.TrimSpace(pin)) == 0 {
			err = fmt.Errorf("%s is empty", path)
		}
		if err != nil {
			return Token{}, fmt.Errorf("%w: the token in %s is incomplete: %w", sessionpool.ErrConfig, t.Dir, err)
		}
		if err := os.Chmod(path, 0o600); err != nil {
			return Token{}, err
		}
	}
	for _, dir := range []string{t.Dir, t.store()} {
		if err := os.Chmod(dir, 0o700); err != nil { //nolint:gosec // a directory
			return Token{}, fmt.Errorf("%w: the token in %s is incomplete: %w", sessionpool.ErrConfig, t.Dir, err)
		}
	}
	if !bytes.Equal(conf, t.conf()) {
		if err := replaceFile(t.Conf(), t.conf()); err != nil {
			return Token{}, err
		}
	}
	if err := os.Chmod(t.Conf(), 0o600); err != nil {
		return Token{}, err
	}
	return t, t.check(module)
}

// replaceFile puts new content into the place of a file, all or nothing.
func replaceFile(path string, content []byte) error {
	next := path + ".new"
	if err := os.WriteFile(next, content, 0o600); err != nil {
		return err
	}
	if err := os.Rename(next, path); err != nil {
		return errors.Join(err, os.Remove(next))
	}
	return nil
}

// build makes the token beside its directory and moves it there.
func build(ctx context.Context, t Token, module string) (err error) {
	if err := CheckLabel(t.Label); err != nil {
		return err
	}
	part := t
	part.Dir += ".unfinished"
	if err := os.RemoveAll(part.Dir); err != nil { // of one that was killed
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(part.Dir))
		}
	}()
	for _, dir := range []string{part.Dir, part.store()} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
	}
	pin, soPIN := rand.Text(), rand.Text()
	for path, content := range map[string][]byte{
		part.Conf():      part.conf(),
		part.PINFile():   []byte(pin + "\n"),
		part.soPINFile(): []byte(soPIN + "\n"),
	} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			return err
		}
	}
	if err := part.initialise(ctx, module, pin, soPIN); err != nil {
		return err
	}
	if err := os.WriteFile(part.Conf(), t.conf(), 0o600); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("making the token: %w", context.Cause(ctx))
	}
	if err := os.Remove(t.Dir); err != nil && !os.IsNotExist(err) { // it is empty
		return err
	}
	return os.Rename(part.Dir, t.Dir)
}
