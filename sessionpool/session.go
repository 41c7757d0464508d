package sessionpool

import (
	"context"
	"errors"
	"sync/atomic"

	"github.com/miekg/pkcs11"
)

// Session is a logical session: the right to use one physical PKCS#11 session
// until Release or Close. It may be used by several goroutines, whose calls then
// run one after the other.
type Session struct {
	pool  *Pool
	inner *Pool        // of a one-time PIN: the pool that this session is all of
	ended atomic.Int32 // asOpen, byRelease or byClose
	turn  chan struct{}

	// Owned by the holder of turn.
	physical *physical
	lost     bool // the physical session and its place are no longer ours
	given    bool // the physical session went back
}

// How a session has ended.
const (
	asOpen int32 = iota // not yet
	byRelease
	byClose
)

func newSession(pool *Pool, p *physical) *Session {
	return &Session{pool: pool, physical: p, turn: make(chan struct{}, 1)}
}

// Do runs fn with the session's handle, on the session's own goroutine, or the
// caller's where [Config.Direct] says so, and is the only way to a handle.
//
// When ctx ends, or one PKCS#11 call takes longer than Config.OpTimeout, Do
// returns at once with the error of ctx or [ErrTimeout] while fn may still be
// stuck: after such an error what fn writes to must not be touched. The session
// is then closed as soon as the call comes back.
//
// A failure that the session, the token or the HSM is to blame for matches
// [ErrSession]; what was lost has been renewed, or will be for the next caller.
// If nothing of fn had reached the token by then, Do renews it at once and runs
// fn again, a few times at most. Other errors of fn come back unchanged. A
// panic of fn is a panic of Do. After Release or Close: [ErrClosed].
func (s *Session) Do(ctx context.Context, fn func(Module, pkcs11.SessionHandle) error) error {
	select {
	case s.turn <- struct{}{}:
	default:
		select {
		case s.turn <- struct{}{}:
		case <-ctx.Done():
			return waitError(ctx, "waiting for the session")
		}
	}
	defer s.finish()
	if s.ended.Load() != asOpen {
		return fail(ErrClosed, nil, "the session was released")
	}
	if err := ctx.Err(); err != nil {
		return waitError(ctx, "using a session")
	}
	t := s.pool.token
	for run := 1; ; run++ {
		if err := s.ready(ctx); err != nil {
			return err
		}
		p := s.physical
		p.broken = true // unless fn returns: a panic may leave an operation active
		err, left := p.call(ctx, s.pool.cfg.OpTimeout, work{fn: fn, pool: s.pool, ctx: ctx})
		p.broken = false
		if left {
			s.lost = true
			return err
		}
		if err == nil && p.guard.failed == nil {
			if t.failures.Load() != 0 {
				t.failures.Store(0)
			}
			return nil
		}
		again, err := s.judge(ctx, err, run == runs)
		if !again {
			return err
		}
		t.counts.recoveries.Add(1)
		t.emit(Event{Kind: Recovered, Err: err})
	}
}

// runs bounds how often Do runs a function of which nothing reached the token.
const runs = 4

// ready makes sure that there is a physical session to use, replacing one that
// is known to be dead, and that it is logged in.
func (s *Session) ready(ctx context.Context) error {
	t, p := s.pool.token, s.physical
	if s.lost {
		return fail(ErrSession, nil, "%s: this session is lost; take another one", t.name)
	}
	if !p.broken && !p.kind.public() && !t.login.done.Load() && !t.outdated(p) {
		err := t.ensureLogin(ctx, s.pool, p)
		s.lost = p.orphaned()
		if s.lost || err != nil && !p.broken {
			return err
		}
	}
	if p.broken || t.outdated(p) {
		if s.pool.once {
			return fail(ErrSession, nil, "%s: the session of a one-time PIN was lost", t.name)
		}
		if left := t.shut(ctx, p, CloseLost); left {
			s.lost = true
			return hangs(ctx, t)
		}
		bypass := p.bypass
		fresh, err := t.openFor(ctx, s.pool, p.kind)
		if err != nil {
			t.cache.free()
			s.lost = true
			return err
		}
		fresh.bypass, fresh.place, fresh.resets = bypass, true, t.resets.Load()
		s.physical = fresh
		return nil
	}
	return nil
}

// judge decides what the outcome of a run says about the session, and whether
// the run is to be made again.
func (s *Session) judge(ctx context.Context, err error, last bool) (again bool, _ error) {
	t, p := s.pool.token, s.physical
	reached, code := p.guard.reached, err
	if classify(err) == callerFault && p.guard.failed != nil && (err == nil || !hasCode(err)) {
		code = p.guard.failed
	}
	c := classify(code)
	if !c.sessionFault() {
		return false, err
	}
	if c.doubtful() {
		var fine bool
		if c, fine = s.probe(ctx, c); fine && err == nil {
			return false, nil // an object's own trouble, without which the function did
		}
	}
	switch c {
	case staleHandle:
		t.epoch.Add(1)
	case loginLost:
		t.loginLost()
	default:
		p.broken = true
		p.open = p.open && !gone(code)
		t.suspicion.Add(1)
		if gone(code) {
			// Perhaps all are, and the login with them.
			t.login.doubt()
		}
		if c == moduleLost && !errors.Is(code, errShut) {
			t.library.lost(p.generation)
		}
		if (c == tokenGone || c == hsmDown) && t.failures.Add(1) >= failuresBeforeRestart {
			t.emit(Event{Kind: HSMDown, Err: code})
		}
	}
	switch {
	case err == nil:
		return false, nil
	case c == staleHandle && last:
		return false, err // it was never the session's fault
	case !last && !reached && c.untouched() && !s.lost:
		return true, err
	}
	return false, fail(ErrSession, err, "%s: the session was lost", t.name)
}

// probe asks the session what a code that may mean several things meant. If it is
// fine, the code stands for itself.
func (s *Session) probe(ctx context.Context, c class) (_ class, fine bool) {
	p, in := s.physical, false
	err, left := p.call(ctx, s.pool.cfg.OpTimeout, work{step: func() (err error) {
		in, err = p.loggedIn()
		return err
	}})
	switch {
	case left:
		s.lost = true
		return max(c, sessionBroken), false
	case err != nil:
		p.open = p.open && !gone(err)
		return max(classify(err), sessionBroken), false
	case !in && !p.kind.public() && s.pool.token.needsLogin():
		return loginLost, false
	}
	return c, true
}

// finish ends a turn, and gives the session back if it was released meanwhile.
func (s *Session) finish() {
	<-s.turn
	if s.ended.Load() != asOpen {
		s.giveBack()
	}
}

// Release ends the logical session. The physical one goes back to the cache, or
// is closed if it may not be reused. Releasing twice, or after Close, does
// nothing. A call that is going on finishes first, in the background.
func (s *Session) Release() { s.end(byRelease) }

// Close ends the logical session and closes the physical one (the seed's
// CLOSE_PHYSICALLY). Closing twice, or after Release, does nothing.
func (s *Session) Close() { s.end(byClose) }

func (s *Session) end(how int32) {
	if s.ended.CompareAndSwap(asOpen, how) {
		s.giveBack()
	}
}

// giveBack gives the physical session back, once, when nobody uses it: whoever
// has the turn does it afterwards.
func (s *Session) giveBack() {
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	default:
		return
	}
	if s.given {
		return
	}
	s.given = true
	if s.inner != nil {
		s.endOneTime()
		return
	}
	defer s.pool.left()
	t, p := s.pool.token, s.physical
	switch {
	case s.lost:
	case p.broken && p.open:
		// Closing it may hang as well; nobody should wait for that.
		t.later(s.pool, func() { t.discard(p, CloseLost) })
	case p.broken || t.outdated(p):
		t.discard(p, CloseLost)
	case p.resets != t.resets.Load():
		t.discard(p, CloseAsked)
		t.endUnusedLogin()
	case s.ended.Load() == byClose || p.bypass || s.pool.cfg.DisableCache || s.pool.isClosed():
		t.discard(p, CloseAsked)
	default:
		t.keep(p)
	}
}

// Token is the token that the session is on. Sessions of one token have the
// same *Token for as long as a pool on it is open.
func (s *Session) Token() *Token {
	if s.inner != nil {
		return s.inner.token
	}
	return s.pool.token
}

// Direct reports whether calls are made on the goroutine of Do's caller: see
// Config.Direct.
func (s *Session) Direct() bool { return s.pool.cfg.Direct }

// Memo remembers the value of key for this physical session, so that the next
// user of the session has it: an object handle, above all. It is forgotten when
// a login is renewed or a handle turns out stale. find is called when there is
// none; its error is not remembered. Memo may be called only inside of a
// function that Do runs.
func (s *Session) Memo(key any, find func() (any, error)) (any, error) {
	p := s.physical
	if v, ok := p.memo[key]; ok {
		return v, nil
	}
	v, err := find()
	if err != nil {
		return nil, err
	}
	if p.memo == nil {
		p.memo = map[any]any{}
	}
	p.memo[key] = v
	return v, nil
}

// ContextPIN reads the pool's PIN for the context-specific login of a key with
// CKA_ALWAYS_AUTHENTICATE (PKCS#11 v2.40, 4.9), which the function given to Do
// makes. That may take long, so it is done before. A PIN that a token rejected is
// refused, matching [ErrPIN], here as well as there.
func (s *Session) ContextPIN(ctx context.Context) (string, error) {
	if s.inner != nil {
		return "", fail(ErrUnsupported, nil, "a one-time PIN cannot authorise each signature of a key")
	}
	if s.pool.cfg.PIN == nil {
		return "", fail(ErrPIN, nil, "the key asks for the PIN at each use, and none is configured")
	}
	pin, err := readPIN(ctx, s.pool.pinSource())
	if err != nil {
		return "", err
	}
	if err := s.pool.pinGuard().refused(digestOf(pin)); err != nil {
		return "", err
	}
	return pin, nil
}
