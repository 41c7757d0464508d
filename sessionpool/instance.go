package sessionpool

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"
)

// instance is one loaded copy of a library. It counts the calls that are inside
// of it, because C_Finalize is undefined while there are any: whoever wants to
// finalise closes the gate, waits until it is empty, and opens it again.
type instance struct {
	module Module
	inside atomic.Int64
	shut   atomic.Bool
	empty  chan struct{} // told, without waiting, when the last call leaves a shut gate
}

// errShut is what a call meets at a shut gate: the library is being finalised.
var errShut error = pkcs11.Error(pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED)

func (in *instance) enter() error {
	in.inside.Add(1)
	if in.shut.Load() {
		in.leave()
		return errShut
	}
	return nil
}

func (in *instance) leave() {
	if in.inside.Add(-1) == 0 && in.shut.Load() {
		select {
		case in.empty <- struct{}{}:
		default:
		}
	}
}

// drain shuts the gate and waits until no call is inside. It reports whether
// that came true in time.
func (in *instance) drain(timeout time.Duration) bool {
	in.shut.Store(true)
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	for in.inside.Load() > 0 {
		select {
		case <-in.empty:
		case <-timer.C:
			return in.inside.Load() == 0
		}
	}
	return true
}

// reopen lets calls in again.
func (in *instance) reopen() { in.shut.Store(false) }

func newInstance(m Module, wrap func(Module) Module) *instance {
	if wrap != nil {
		m = wrap(m)
	}
	return &instance{module: m, empty: make(chan struct{}, 1)}
}

// copyLibrary copies a library, so that the loader, which knows libraries by
// device and inode, takes it for another one.
func copyLibrary(path string) (copied string, err error) {
	from, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer from.Close()
	dir, err := os.MkdirTemp("", "hsmkey-module-")
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(dir)
		}
	}()
	copied = filepath.Join(dir, filepath.Base(path))
	to, err := os.OpenFile(copied, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o700)
	if err != nil {
		return "", err
	}
	if _, err := io.Copy(to, from); err != nil {
		to.Close()
		return "", err
	}
	return copied, to.Close()
}

// await runs a step that may hang in the library on a goroutine of its own, and
// leaves it behind when ctx or timeout ends first.
func await[T any](ctx context.Context, timeout time.Duration, what string, step func() (T, error)) (T, error) {
	type outcome struct {
		value T
		err   error
	}
	done := make(chan outcome, 1)
	go func() {
		v, err := step()
		done <- outcome{v, err}
	}()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	var none T
	select {
	case o := <-done:
		return o.value, o.err
	case <-ctx.Done():
		return none, waitError(ctx, what)
	case <-timer.C:
		return none, fail(ErrTimeout, nil, "%s took longer than %v", what, timeout)
	}
}

// setEnv sets NAME=value pairs for the time that a module initialises, and
// returns what puts the old values back.
func setEnv(pairs []string) (restore func(), err error) {
	type old struct {
		name, value string
		was         bool
	}
	var olds []old
	restore = func() {
		for _, o := range olds {
			if o.was {
				os.Setenv(o.name, o.value)
			} else {
				os.Unsetenv(o.name)
			}
		}
	}
	for _, pair := range pairs {
		name, value, _ := strings.Cut(pair, "=")
		before, was := os.LookupEnv(name)
		olds = append(olds, old{name, before, was})
		if err := os.Setenv(name, value); err != nil {
			restore()
			return nil, fmt.Errorf("setting %s: %w", name, err)
		}
	}
	return restore, nil
}
