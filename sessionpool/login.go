package sessionpool

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"
)

// login is the state of the application's login to one token. PKCS#11 logs in
// an application, not a session, and logs it out when its last session closes:
// so one login serves all, and the anchor, a session that nobody uses, keeps it
// while sessions come and go.
type login struct {
	done     atomic.Bool   // logged in, as far as we know; changed with mu held
	count    atomic.Uint64 // logins so far: a pool whose PIN was checked in this one is known; changed with mu held
	mu       sync.Mutex
	pin      digest
	verified bool // the token itself accepted pin
	anchor   *physical
	single   bool // the token bears one session only: no anchor
	flight   *flight
}

// flight is a login that is going on; others wait for it and share its outcome.
type flight struct {
	done chan struct{}
	err  error
}

// guards holds the PIN guard of every token that was ever logged in to, so that
// opening a pool again does not send a wrong PIN again.
var guards = struct {
	sync.Mutex
	byToken map[string]*PINGuard
}{byToken: map[string]*PINGuard{}}

func (p *Pool) pinGuard() *PINGuard {
	if p.cfg.PINGuard != nil {
		return p.cfg.PINGuard
	}
	info := p.token.Info()
	key := p.cfg.Module + "\x00" + info.Serial + "\x00" + info.Label
	guards.Lock()
	defer guards.Unlock()
	if guards.byToken[key] == nil {
		guards.byToken[key] = &PINGuard{}
	}
	return guards.byToken[key]
}

// needsLogin reports whether user sessions on the token are logged in at all.
func (t *Token) needsLogin() bool { return t.Info().Flags&pkcs11.CKF_LOGIN_REQUIRED != 0 }

// loginLost notes that the application is no longer logged in.
func (t *Token) loginLost() {
	t.login.mu.Lock()
	was := t.login.done.Swap(false)
	t.login.mu.Unlock()
	if was {
		t.emit(Event{Kind: LoginLost})
	}
}

// pinKey is the context's key for a PIN that was read for the login that it leads
// to.
type pinKey struct{}

// known reports whether the pool's PIN was found right in the present login.
func (l *login) known(p *Pool) bool {
	count := l.count.Load()
	return count > 0 && p.known.Load() == count
}

// pinDue reports whether a session of the pool needs the PIN first. A login that
// there is reason to doubt may still hold.
func (t *Token) pinDue(p *Pool) bool { return t.needsLogin() && !t.login.known(p) }

// ensureLogin makes sure that the application is logged in, and that the pool's
// PIN is the right one. on is the caller's own session, or nil: where the token
// bears an anchor the login goes through that.
func (t *Token) ensureLogin(ctx context.Context, p *Pool, on *physical) error {
	if !t.needsLogin() {
		return nil
	}
	l := &t.login
	var patience *time.Timer // runs from when there is something to wait for
	for {
		l.mu.Lock()
		if l.done.Load() && l.known(p) || l.single && on == nil {
			l.mu.Unlock()
			return nil
		}
		f := l.flight
		if f == nil {
			f = &flight{done: make(chan struct{})}
			l.flight = f
			l.mu.Unlock()
			f.err = t.logIn(ctx, p, on)
			l.mu.Lock()
			l.flight = nil
			l.mu.Unlock()
			close(f.done)
			return f.err
		}
		l.mu.Unlock()
		if patience == nil {
			patience = time.NewTimer(p.cfg.OpTimeout)
			defer patience.Stop()
		}
		select {
		case <-f.done:
			// The PIN of another pool, or its context, is not ours.
			if errors.Is(f.err, ErrTimeout) && ctx.Err() == nil && !errors.Is(f.err, context.DeadlineExceeded) {
				return f.err
			}
		case <-ctx.Done():
			return waitError(ctx, "waiting for the login")
		case <-patience.C:
			return fail(ErrTimeout, nil, "%s: the login took longer than %v", t.name, p.cfg.OpTimeout)
		}
	}
}

// logIn is the one login that goes on.
func (t *Token) logIn(ctx context.Context, p *Pool, on *physical) error {
	if t.Info().Flags&pkcs11.CKF_USER_PIN_INITIALIZED == 0 {
		return fail(ErrPIN, nil, "%s has no user PIN yet", t.name)
	}
	l := &t.login
	l.mu.Lock()
	done, was, count := l.done.Load(), l.pin, l.count.Load()
	l.mu.Unlock()
	var through *physical
	var in bool
	var err error
	if !done && count > 0 {
		if through, in, err = t.loginSession(ctx, p, on); err != nil || through == nil {
			return err
		}
		if in && l.known(p) {
			// Our own login, which we had reason to doubt, still holds.
			l.confirm()
			return nil
		}
	}
	if p.once && count > 0 {
		return fail(ErrPIN, nil, "the session of a one-time PIN was lost; it is not sent again")
	}
	pin, read := ctx.Value(pinKey{}).(string)
	if !read {
		pin, err = readPIN(ctx, p.pinSource())
	}
	if err != nil {
		return err
	}
	d := digestOf(pin)
	if done {
		// The application is logged in already, by another pool.
		if d != was {
			return fail(ErrPIN, nil, "%s: the PIN differs from the one that this process is logged in with", t.name)
		}
		p.known.Store(count)
		return nil
	}
	if through == nil {
		if through, in, err = t.loginSession(ctx, p, on); err != nil || through == nil {
			return err
		}
	}
	if in && count > 0 && d == was {
		p.known.Store(count)
		l.confirm()
		return nil
	}
	return t.sendPIN(ctx, p, through, pin, d)
}

// loginSession is the session that a login goes through: the anchor, opened if
// need be, or the caller's own where there is none; in says that it is logged
// in already. It is nil where the login has to wait until the caller has a
// session. Only the login that goes on uses the anchor.
func (t *Token) loginSession(ctx context.Context, p *Pool, on *physical) (session *physical, in bool, err error) {
	l := &t.login
	l.mu.Lock()
	anchor, single := l.anchor, l.single
	l.mu.Unlock()
	if anchor != nil {
		if t.outdated(anchor) {
			t.dropAnchor(p, anchor)
		} else if in, err, left := anchor.check(ctx, p.cfg.OpTimeout); err == nil {
			return anchor, in, nil
		} else if !left {
			t.dropAnchor(p, anchor)
		}
	}
	if !single && (p.once || t.Info().MaxSessions == 1) {
		single = true
		l.mu.Lock()
		l.single = true
		l.mu.Unlock()
	}
	if !single {
		anchor, err = t.openPhysical(ctx, p, 0, true)
		if err != nil && !isCode(err, pkcs11.CKR_SESSION_COUNT) {
			return nil, false, err
		}
		single = err != nil // for this time
	}
	if single {
		if on == nil {
			return nil, false, nil
		}
		in, err, left := on.check(ctx, p.cfg.OpTimeout)
		if err != nil && !left {
			t.unfit(p, on, err)
			err = fail(ErrSession, err, "%s: the session was lost before the login", t.name)
		}
		return on, in, err
	}
	l.mu.Lock()
	l.anchor = anchor
	l.mu.Unlock()
	return anchor, false, nil
}

// admit waits for another login that sends a PIN.
func (p *Pool) admit(ctx context.Context, d digest) (verdict func(error), err error) {
	return p.pinGuard().admit(ctx, d, p.token.name, p.cfg.OpTimeout)
}

// sendPIN is the only place that logs a user in.
func (t *Token) sendPIN(ctx context.Context, p *Pool, on *physical, pin string, d digest) error {
	verdict, err := p.admit(ctx, d)
	if err != nil {
		return err
	}
	slot := t.Info().Slot
	// The verdict is given on the session's goroutine, also when C_Login comes
	// back so late that nobody waits for it any more.
	err, left := on.call(ctx, p.cfg.OpTimeout, work{step: func() error {
		err := refusePIN(&on.guard, slot)
		if err != nil {
			verdict(err)
			return err
		}
		// Before the login, not after: a search that began before it must not
		// end without noticing.
		t.epoch.Add(1)
		err = on.guard.do(func(m Module) error { return m.Login(on.handle, pkcs11.CKU_USER, pin) })
		verdict(err)
		return t.loginOutcome(p, d, err)
	}})
	if err != nil && !left && classify(err) >= sessionBroken {
		t.unfit(p, on, err)
	}
	return err
}

// authorise is the login that a key wants before a signature, on the goroutine of
// its session. The token counts wrong PINs of such logins as well.
func (p *Pool) authorise(ctx context.Context, g *guard, h pkcs11.SessionHandle, pin string) error {
	if pin == "" {
		return errEmptyPIN
	}
	verdict, err := p.admit(ctx, digestOf(pin))
	if err != nil {
		return err
	}
	if err := refusePIN(g, p.token.Info().Slot); err != nil {
		verdict(err)
		return err
	}
	err = g.do(func(m Module) error { return m.Login(h, pkcs11.CKU_CONTEXT_SPECIFIC, pin) })
	verdict(err)
	return p.token.loginError(err)
}

// unfit sorts out a session through which no login went.
func (t *Token) unfit(p *Pool, on *physical, err error) {
	on.open = on.open && !gone(err)
	t.suspicion.Add(1)
	if on.anchor {
		t.dropAnchor(p, on)
	} else {
		on.broken = true
	}
}

// refusePIN asks the token whether a PIN may be sent at all: a wrong one could
// be the last.
func refusePIN(g *guard, slot uint) error {
	info, err := g.GetTokenInfo(slot)
	switch {
	case err != nil:
		return fail(ErrSession, err, "the token does not tell its state")
	case info.Flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return fail(ErrPIN, pkcs11.Error(pkcs11.CKR_PIN_LOCKED), "the user PIN is locked; the security officer has to set a new one")
	case info.Flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		return fail(ErrPIN, nil, "the token allows one last try of the user PIN, which is left to a person: log in once with the vendor's tool")
	}
	return nil
}

// loginOutcome takes in what C_Login answered.
func (t *Token) loginOutcome(p *Pool, d digest, err error) error {
	verified := err == nil
	l := &t.login
	switch {
	case verified:
	case isCode(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN):
		// Our own login that we had lost sight of, or somebody else's, whose
		// PIN we cannot know.
		l.mu.Lock()
		verified = l.verified && l.pin == d
		differs := l.verified && l.pin != d
		l.mu.Unlock()
		if differs {
			return fail(ErrPIN, err, "%s: the PIN differs from the one that this process is logged in with", t.name)
		}
	case isCode(err, pkcs11.CKR_FUNCTION_NOT_SUPPORTED):
		// There is no login.
	default:
		return t.loginError(err)
	}
	l.mu.Lock()
	l.done.Store(true)
	l.pin, l.verified = d, verified
	p.known.Store(l.count.Add(1))
	l.mu.Unlock()
	t.counts.logins.Add(1)
	t.emit(Event{Kind: LoggedIn})
	return nil
}

// loginError says why C_Login failed, if it did.
func (t *Token) loginError(err error) error {
	switch {
	case err == nil:
		return nil
	case isCode(err, pkcs11.CKR_PIN_LOCKED):
		return fail(ErrPIN, err, "%s: the user PIN is locked; the security officer has to set a new one", t.name)
	case isCode(err, pkcs11.CKR_PIN_EXPIRED):
		return fail(ErrPIN, err, "%s: the user PIN has expired; set a new one", t.name)
	case rejectsPIN(err):
		return fail(ErrPIN, err, "%s rejected the PIN (it is not tried again; correct the PIN before the token locks)", t.name)
	case classify(err).sessionFault():
		return fail(ErrSession, err, "%s: the login failed", t.name)
	}
	return fail(ErrPIN, err, "%s: the login failed", t.name)
}

// confirm ends a doubt.
func (l *login) confirm() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.done.Store(true)
}

// doubt makes the next one who needs the login look whether it still holds.
func (l *login) doubt() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.done.Store(false)
}

// mayEnd is told of each session that we close: without an anchor the login goes
// with the last of them.
func (l *login) mayEnd() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.single {
		l.done.Store(false)
	}
}

// settle waits for the login that goes on, if one does.
func (l *login) settle(ctx context.Context) {
	l.mu.Lock()
	f := l.flight
	l.mu.Unlock()
	if f != nil {
		select {
		case <-f.done:
		case <-ctx.Done():
		}
	}
}

// dropAnchor closes an anchor that is of no use any more, in the background:
// that may hang as well.
func (t *Token) dropAnchor(p *Pool, anchor *physical) {
	l := &t.login
	l.mu.Lock()
	if l.anchor == anchor {
		l.anchor = nil
		l.done.Store(false)
	}
	l.mu.Unlock()
	t.later(p, func() { t.discard(anchor, CloseLost) })
}

// takeAnchor takes the anchor out, to be closed: the login goes with it. It is
// nil while a login goes on.
func (t *Token) takeAnchor() *physical {
	l := &t.login
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.flight != nil || l.anchor == nil {
		return nil
	}
	anchor := l.anchor
	l.anchor = nil
	l.done.Store(false)
	return anchor
}
