package sessionpool

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"
)

// PINSource yields the user PIN each time a login is due. An error, or an empty
// PIN, ends the login before anything is sent to the token.
type PINSource func(ctx context.Context) (string, error)

// StaticPIN is a source that always yields pin.
func StaticPIN(pin string) PINSource {
	return func(context.Context) (string, error) { return pin, nil }
}

// maxPINFile bounds what is read of a PIN file; PKCS#11 PINs are far shorter.
const maxPINFile = 4096

// PINFile is a source that reads the PIN from the first line of a file at each
// login, so that a rotated PIN is picked up without a restart. A name without a
// slash of a file that is not there is in no error: it may be the PIN itself.
func PINFile(path string) PINSource {
	return func(context.Context) (string, error) {
		data, err := readPINFile(path)
		if errors.Is(err, fs.ErrNotExist) && !strings.ContainsRune(path, filepath.Separator) {
			return "", fail(ErrPIN, fs.ErrNotExist, "cannot read the PIN file; its name is not shown, it may be the PIN itself")
		}
		if err != nil {
			return "", fail(ErrPIN, err, "cannot read the PIN file")
		}
		line, _, _ := strings.Cut(string(data), "\n")
		return strings.TrimSuffix(line, "\r"), nil
	}
}

// readPINFile reads a file or a pipe (a shell's process substitution).
func readPINFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, maxPINFile+1))
	if err == nil && len(data) > maxPINFile {
		err = &os.PathError{Op: "read", Path: path, Err: errors.New("too large for a PIN")}
	}
	return data, err
}

var errEmptyPIN = fail(ErrPIN, nil, "the PIN is empty; it was not sent")

// readPIN asks a source and refuses what must not reach a token.
func readPIN(ctx context.Context, source PINSource) (string, error) {
	pin, err := ask(ctx, source)
	if err != nil {
		if ctx.Err() != nil {
			return "", waitError(ctx, "reading the PIN")
		}
		return "", fail(ErrPIN, err, "the PIN cannot be had")
	}
	if pin == "" {
		return "", errEmptyPIN
	}
	return pin, nil
}

// ask makes a panic of a source an error: a login is shared, and nobody else's
// should hang because of it. What was panicked with may hold the PIN.
func ask(ctx context.Context, source PINSource) (pin string, err error) {
	defer func() {
		if v := recover(); v != nil {
			cause, _ := v.(runtime.Error)
			err = fail(ErrPIN, cause, "the PIN source panicked")
		}
	}()
	return source(ctx)
}

// digest stands for a PIN where one is remembered. The key is the process's
// own, so that a digest in a core dump is worth little on its own.
type digest [sha256.Size]byte

var digestKey = sync.OnceValue(func() (key [32]byte) {
	rand.Read(key[:]) // never fails: it ends the process instead
	return key
})

func digestOf(pin string) digest {
	key := digestKey()
	return sha256.Sum256(append(key[:], pin...))
}

// PINGuard makes a wrong PIN cost one attempt: what one token rejected is not
// sent again by any pool that shares the guard. So that two do not find out at
// once, PINs are sent to an HSM one after the other, and one that no token has
// accepted yet to one HSM at a time. The zero value is ready; it is safe for
// concurrent use.
type PINGuard struct {
	mu       sync.Mutex
	rejected map[digest]error
	accepted map[digest]bool
	sending  map[string]chan struct{} // by HSM; closed when the next PIN may be sent there
}

// anyHSM stands for all of them where a PIN is sent that may be wrong everywhere.
const anyHSM = ""

// refused says why a PIN is not sent at all.
func (g *PINGuard) refused(pin digest) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.refusal(pin)
}

// refusal is refused for who holds mu.
func (g *PINGuard) refusal(pin digest) error {
	if cause := g.rejected[pin]; cause != nil {
		return fail(ErrPIN, cause, "this PIN was rejected before and is not sent again; correct the PIN first")
	}
	return nil
}

// admit asks to send a PIN to an HSM. It returns the function that takes the
// verdict: nil when the token accepted the PIN, the error of the token that
// rejected it, or anything else when the PIN was not judged. It waits for others no
// longer than a call may last, and holds up others no longer than that with a proven
// PIN: the verdict may never come.
func (g *PINGuard) admit(ctx context.Context, pin digest, hsm string, opTimeout time.Duration) (func(error), error) {
	var limited context.Context // runs from when there is something to wait for
	for {
		g.mu.Lock()
		if err := g.refusal(pin); err != nil {
			g.mu.Unlock()
			return nil, err
		}
		proven, at := g.accepted[pin], hsm
		if !proven {
			at = anyHSM
		}
		other := g.sending[at]
		if other == nil {
			next := g.begin(at)
			g.mu.Unlock()
			if proven {
				next = after(opTimeout, next)
			}
			return func(verdict error) {
				g.judge(pin, verdict)
				next()
			}, nil
		}
		g.mu.Unlock()
		if limited == nil {
			var cancel context.CancelFunc
			limited, cancel = context.WithTimeoutCause(ctx, opTimeout, &slowError{opTimeout})
			defer cancel()
		}
		select {
		case <-other:
		case <-limited.Done():
			return nil, waitError(limited, "waiting for another login")
		}
	}
}

// begin takes the turn to send a PIN, and returns what lets the next one have it.
// The caller holds mu.
func (g *PINGuard) begin(hsm string) (next func()) {
	done := make(chan struct{})
	if g.sending == nil {
		g.sending = make(map[string]chan struct{})
	}
	g.sending[hsm] = done
	return sync.OnceFunc(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.sending, hsm)
		close(done)
	})
}

// after has step run when its time has come, or earlier: when the returned function
// is called. Step must bear both.
func after(d time.Duration, step func()) func() {
	timer := time.AfterFunc(d, step)
	return func() {
		timer.Stop()
		step()
	}
}

func (g *PINGuard) judge(pin digest, verdict error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case verdict == nil:
		if g.accepted == nil {
			g.accepted = make(map[digest]bool)
		}
		g.accepted[pin] = true
	case rejectsPIN(verdict):
		if g.rejected == nil {
			g.rejected = make(map[digest]error)
		}
		g.rejected[pin] = verdict
		delete(g.accepted, pin)
	}
}

// forget lifts the block of one PIN: a person has said again that it is right.
func (g *PINGuard) forget(pin digest) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.rejected, pin)
}
