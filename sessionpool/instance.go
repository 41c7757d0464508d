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

// instance is one loaded copy of a library.
type instance struct {
	module Module
	direct bool // its calls do not hang, or those who make them bear it
	// generation is the library's; it changes only while the gate is shut, so
	// that no call comes with a handle of an older one.
	generation *atomic.Uint64
	*gate
}

// gate counts the calls that are inside of a loaded copy, however it is decorated,
// because C_Finalize is undefined while there are any: whoever wants to finalise
// shuts the gate, waits until nobody is inside, and opens it again.
type gate struct {
	inside atomic.Int64
	shut   atomic.Bool
	empty  chan struct{} // told, without waiting, when the last call leaves a shut gate
}

func newGate() *gate { return &gate{empty: make(chan struct{}, 1)} }

// errShut is what a call meets at a shut gate.
var errShut = fail(ErrSession, pkcs11.Error(pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED), "the PKCS#11 library is being finalised")

func (g *gate) enter() error {
	g.inside.Add(1)
	if g.shut.Load() {
		g.leave()
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

func (g *gate) leave() {
	if g.inside.Add(-1) == 0 && g.shut.Load() {
		select {
		case g.empty <- struct{}{}:
		default:
		}
	}
}

// drain shuts the gate and waits until no call is inside. It reports whether
// that came true in time.
func (g *gate) drain(timeout time.Duration) bool {
	g.shut.Store(true)
	if g.inside.Load() == 0 {
		return true
	}
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	for g.inside.Load() > 0 {
		select {
		case <-g.empty:
		case <-timer.C:
			return g.inside.Load() == 0
		}
	}
	return true
}

// reopen lets calls in again.
func (g *gate) reopen() { g.shut.Store(false) }

func (l *library) newInstance(m Module, g *gate) *instance {
	if l.wrap != nil {
		m = l.wrap(m)
	}
	return &instance{module: m, direct: l.direct, generation: &l.generation, gate: g}
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
// leaves it behind when ctx or timeout ends first; a direct one it just runs.
func await[T any](ctx context.Context, direct bool, timeout time.Duration, what string, step func() (T, error)) (T, error) {
	if direct {
		return step()
	}
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
