package sessionpool

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"
)

// instance is one loaded copy of a library. It counts the calls that are inside
// of it, because C_Finalize is undefined while there are any: whoever wants to
// finalise closes the gate, waits until it is empty, and opens it again.
type instance struct {
	module Module
	// generation is the library's; it changes only while the gate is shut, so
	// that no call comes with a handle of an older one.
	generation *atomic.Uint64
	inside     atomic.Int64
	shut       atomic.Bool
	empty      chan struct{} // told, without waiting, when the last call leaves a shut gate
}

// errShut is what a call meets at a shut gate.
var errShut = fail(ErrSession, pkcs11.Error(pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED), "the PKCS#11 library is being finalised")

func (in *instance) enter() error {
	in.inside.Add(1)
	if in.shut.Load() {
		in.leave()
		return errShut
	}
	return nil
}

// enterFor is enter for a handle of a generation.
func (in *instance) enterFor(generation uint64) error {
	if err := in.enter(); err != nil {
		return err
	}
	if in.generation.Load() != generation {
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

func (l *library) newInstance(m Module) *instance {
	if l.wrap != nil {
		m = l.wrap(m)
	}
	return &instance{module: m, generation: &l.generation, empty: make(chan struct{}, 1)}
}

// copyLibrary copies a library, so that the loader, which knows libraries by
// device and inode, takes it for another one.
func copyLibrary(path string) (copied string, err error) {
	from, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer func() { _ = from.Close() }()
	dir, err := os.MkdirTemp("", "hsmkey-module-")
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	copied = filepath.Join(dir, filepath.Base(path))
	to, err := os.OpenFile(copied, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o700) //nolint:gosec // a library may have to be executable to be loaded
	if err != nil {
		return "", err
	}
	if _, err := io.Copy(to, from); err != nil {
		return "", errors.Join(err, to.Close())
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
