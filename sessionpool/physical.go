package sessionpool

import (
	"context"
	"errors"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"
)

// physical is one PKCS#11 session. Its goroutine makes every call on it: a call
// cannot be cancelled, so whoever waits for one must be able to leave while it
// goes on. At most one caller at a time, the holder, sends work to that goroutine
// and waits; a holder that leaves makes the session an orphan, which its
// goroutine closes when the call comes back.
type physical struct {
	token      *Token
	direct     bool // no goroutine: the holder makes the calls
	kind       kind
	generation uint64      // of the library when the session was opened
	replaced   atomic.Bool // the module gave the handle's number to a later session
	work       chan work
	results    chan result
	timer      *time.Timer
	state      atomic.Int32

	// Owned by the goroutine.
	guard  guard
	handle pkcs11.SessionHandle
	epoch  uint64
	memo   map[any]any

	// Owned by the holder, or by the cache while idle.
	open      bool // there is a handle that can be closed
	broken    bool // must not be used again
	bypass    bool // never cached
	suspicion uint64
	idleSince time.Time
	place     bool   // it has a place in the cache's books
	resets    uint64 // of the token when it was opened
	anchor    bool   // it keeps the login
}

const (
	stateIdle int32 = iota
	stateBusy
	stateOrphan   // its caller has left
	stateHung     // and the call has lasted for longer than one may
	stateReturned // the orphan's call came back
)

// orphaned reports whether a caller has left the session.
func (p *physical) orphaned() bool { return p.state.Load() >= stateOrphan }

// work is what the goroutine is asked to do: a caller's function, with his pool and
// his context, or a step of the pool's own.
type work struct {
	fn   func(Module, pkcs11.SessionHandle) error
	pool *Pool
	ctx  context.Context
	step func() error
}

type result struct {
	err      error
	panicked any
	exited   bool // the function left its goroutine (runtime.Goexit)
}

func (t *Token) newPhysical(k kind, in *instance, generation uint64, direct bool) *physical {
	p := &physical{
		token: t, kind: k, generation: generation, direct: direct,
		work: make(chan work), suspicion: t.suspicion.Load(),
	}
	p.guard.instance, p.guard.generation, p.guard.direct = in, generation, direct
	p.guard.user, p.guard.epoch = !k.public() && t.needsLogin(), &t.epoch
	if !direct {
		t.aside.Add(1)
		t.running.Add(1)
		p.results, p.timer = make(chan result, 1), time.NewTimer(time.Hour)
		p.timer.Stop()
		go p.run()
	}
	return p
}

func (p *physical) run() {
	for w := range p.work {
		if !p.deliver(p.perform(w)) {
			return
		}
	}
	p.token.goroutineEnds()
}

// deliver hands the result to whoever waits for it, or, where nobody is left,
// closes the session and ends its goroutine.
func (p *physical) deliver(r result) bool {
	if p.state.CompareAndSwap(stateBusy, stateIdle) {
		p.results <- r
		return true
	}
	if p.handle != 0 && !p.replaced.Load() && !gone(p.guard.failed) {
		p.guard.beginRun(work{})
		_ = p.closeHandle() // nobody is left to be told
		p.guard.endRun()
	}
	p.token.library.handles.forget(p)
	p.token.orphanReturned(p.state.Swap(stateReturned) == stateHung)
	p.token.goroutineEnds()
	return false
}

func (t *Token) goroutineEnds() {
	t.aside.Add(-1)
	t.running.Done()
}

// perform runs the work, and catches whatever way it ends.
func (p *physical) perform(w work) (r result) {
	r.exited = true
	p.guard.beginRun(w)
	defer func() {
		p.guard.endRun()
		if !r.exited {
			return
		}
		if v := recover(); v != nil {
			r.panicked, r.exited = v, false
			return
		}
		// runtime.Goexit cannot be stopped: another goroutine takes over.
		go func() {
			if p.deliver(r) {
				p.run()
			}
		}()
	}()
	r.err = p.make(w)
	r.exited = false
	return r
}

func (p *physical) make(w work) error {
	if w.step != nil {
		return w.step()
	}
	p.refresh()
	return w.fn(&p.guard, p.handle)
}

// call has the goroutine do w, exactly once, and waits for it until ctx ends or
// one PKCS#11 call in it has lasted longer than timeout. left says that it did
// not come back: the session is an orphan and no longer the caller's.
func (p *physical) call(ctx context.Context, timeout time.Duration, w work) (err error, left bool) { //nolint:revive // the error describes the outcome, left who owns the session
	if p.direct {
		p.guard.beginRun(w)
		defer p.guard.endRun()
		return p.make(w), false
	}
	p.state.Store(stateBusy)
	p.work <- w
	p.timer.Reset(timeout)
	defer p.timer.Stop()
	for {
		select {
		case r := <-p.results:
			return r.unpack(), false
		case <-ctx.Done():
			if p.abandon() {
				time.AfterFunc(timeout, p.hang)
				if slow := (*slowError)(nil); errors.As(context.Cause(ctx), &slow) {
					p.token.timedOut()
				}
				return waitError(ctx, p.token.name+": waiting for the HSM"), true
			}
		case <-p.timer.C:
			if began := p.guard.started.Load(); began == 0 {
				p.timer.Reset(timeout)
				continue
			} else if rest := timeout - time.Duration(clock()-began); rest > 0 {
				p.timer.Reset(rest)
				continue
			}
			if p.abandon() {
				p.hang()
				p.token.timedOut()
				return fail(ErrTimeout, nil, "%s did not answer within %v", p.token.name, timeout), true
			}
		}
		// It came back at the last moment.
		return (<-p.results).unpack(), false
	}
}

// unpack gives the result to the caller: its function's panic is the caller's.
func (r result) unpack() error {
	if r.panicked != nil {
		panic(r.panicked)
	}
	if r.exited {
		runtime.Goexit()
	}
	return r.err
}

func (p *physical) abandon() bool {
	if !p.state.CompareAndSwap(stateBusy, stateOrphan) {
		return false
	}
	p.token.orphaned(p)
	return true
}

// hang notes that an orphan's call has lasted for too long.
func (p *physical) hang() {
	if p.state.CompareAndSwap(stateOrphan, stateHung) {
		p.token.cache.orphanHangs()
	}
}

// refresh forgets what was remembered in another epoch.
func (p *physical) refresh() {
	if epoch := p.token.epoch.Load(); epoch != p.epoch {
		p.epoch, p.memo = epoch, nil
	}
}

// openHandle, closeHandle and loggedIn are steps for the goroutine.

func (p *physical) openHandle(slot uint) error {
	flags := uint(pkcs11.CKF_SERIAL_SESSION)
	if p.kind.readWrite() {
		flags |= pkcs11.CKF_RW_SESSION
	}
	err := p.guard.do(func(m Module) (err error) {
		p.handle, err = m.OpenSession(slot, flags)
		return err
	})
	if err == nil {
		p.token.library.handles.claim(p)
	}
	return err
}

// closeHandle forgets the handle, whatever comes of it: a session is closed once.
func (p *physical) closeHandle() error {
	step := func(m Module) error { return m.CloseSession(p.handle) }
	err := p.guard.do(step)
	if errors.Is(err, errShut) {
		// The session outlives a restart that is given up.
		p.token.library.settle(p.token.cache.opTimeout())
		err = p.guard.do(step)
	}
	p.token.library.handles.forget(p)
	p.handle = 0
	return err
}

// loggedIn asks the token what state the session is in.
func (p *physical) loggedIn() (bool, error) {
	info, err := p.guard.GetSessionInfo(p.handle)
	if err != nil {
		return false, err
	}
	return !isPublic(info), nil
}

// isPublic reports whether a session is without login (PKCS#11 v2.40, CK_STATE).
func isPublic(info pkcs11.SessionInfo) bool {
	const roPublic, rwPublic = 0, 2
	return info.State == roPublic || info.State == rwPublic
}

// check asks a session under suspicion whether it is still good, and whether it
// is logged in.
func (p *physical) check(ctx context.Context, timeout time.Duration) (in bool, err error, left bool) { //nolint:revive // as call
	doubt := p.token.suspicion.Load()
	is := new(bool) // the step's alone, for as long as it may go on
	err, left = p.call(ctx, timeout, work{step: func() (err error) {
		*is, err = p.loggedIn()
		return err
	}})
	if left {
		return false, err, true
	}
	p.open = p.open && !gone(err)
	if err == nil {
		p.suspicion = doubt
	}
	return *is && err == nil, err, false
}
