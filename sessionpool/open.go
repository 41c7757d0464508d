package sessionpool

import (
	"context"
	"errors"

	"github.com/miekg/pkcs11"
)

// outdated reports whether a session's handle is dead and may be another
// session's by now: it must be neither used nor closed.
func (t *Token) outdated(p *physical) bool {
	return p.born.generation != t.library.live.Load() || p.born.incarnation != t.incarnation.Load()
}

// failuresBeforeRestart device errors in a row make us initialise the library
// anew: some modules, after their device died, answer nothing else until then.
const failuresBeforeRestart = 2

// openPhysical opens a session, and brings token and library back if they were
// lost: it looks for the token again, and restarts a library whose device does
// not work.
func (t *Token) openPhysical(ctx context.Context, pool *Pool, k kind, spare bool) (*physical, error) {
	const tries = 3
	for try := 1; ; try++ {
		if t.failures.Load() >= failuresBeforeRestart {
			if err := t.restart(ctx, pool); err != nil {
				return nil, t.down(err)
			}
		}
		p, err := t.tryOpen(ctx, pool, k, spare, try > 1)
		if err == nil || !errors.Is(err, ErrSession) || isCode(err, pkcs11.CKR_SESSION_COUNT) {
			return p, err
		}
		switch classify(err) {
		case tokenGone, hsmDown:
			t.failures.Add(1)
		}
		if try == tries || ctx.Err() != nil {
			return nil, t.down(err)
		}
	}
}

// restart initialises the library anew.
func (t *Token) restart(ctx context.Context, pool *Pool) error {
	t.failures.Store(0)
	return t.library.restart(ctx, t.library.live.Load(), pool.cfg.OpTimeout)
}

// down wraps the error of an HSM that does not come back, and tells of it.
func (t *Token) down(err error) error {
	err = fail(ErrSession, err, "%s does not answer", t.name)
	t.emit(Event{Kind: HSMDown, Err: err})
	return err
}

func (t *Token) tryOpen(ctx context.Context, pool *Pool, k kind, spare, again bool) (*physical, error) {
	in, generation, slot, err := t.locate(ctx, &pool.cfg, again)
	if err != nil {
		return nil, err
	}
	p := t.newPhysical(k, in, generation)
	p.spare = spare
	err, left := p.call(ctx, pool.cfg.OpTimeout, work{step: func() error { return p.openHandle(slot) }})
	if left {
		return nil, err
	}
	if err != nil {
		close(p.work)
		if classify(err) == moduleLost {
			t.library.lost(generation)
		}
		return nil, fail(ErrSession, err, "%s: no session can be opened", t.name)
	}
	p.open = true
	t.counts.opened.Add(1)
	t.emit(Event{Kind: SessionOpened})
	return p, nil
}

// openFor opens a session for a caller of the pool, logged in if its kind is.
func (t *Token) openFor(ctx context.Context, pool *Pool, k kind) (*physical, error) {
	if k.public() {
		return t.openPhysical(ctx, pool, k, false)
	}
	if err := t.ensureLogin(ctx, pool, nil); err != nil {
		return nil, err
	}
	p, err := t.openPhysical(ctx, pool, k, false)
	if isCode(err, pkcs11.CKR_SESSION_COUNT) && t.makeRoom() {
		p, err = t.openPhysical(ctx, pool, k, false)
	}
	if err != nil || !t.needsLogin() {
		return p, err
	}
	if err := t.logInFor(ctx, pool, p); err != nil {
		return nil, err
	}
	return p, nil
}

// makeRoom closes the anchor on a token that bears no session beside it.
func (t *Token) makeRoom() bool {
	if t.cache.takenPlaces() > 1 {
		return false
	}
	t.login.settle()
	anchor := t.takeAnchor()
	if anchor == nil {
		return false
	}
	t.login.mu.Lock()
	t.login.single = true
	t.login.mu.Unlock()
	t.discard(anchor, CloseLimit)
	return true
}

// logInFor makes sure that a session is in a user's state. What the token says
// of the session counts, not what we remember of the login: somebody else may
// have logged out. On failure the session is gone.
func (t *Token) logInFor(ctx context.Context, pool *Pool, p *physical) error {
	good, in, left := p.check(pool.cfg.OpTimeout)
	if !good {
		if !left {
			t.shut(p, CloseLost)
		}
		return fail(ErrSession, nil, "%s: a new session is of no use", t.name)
	}
	if !in {
		t.loginLost()
	}
	err := t.ensureLogin(ctx, pool, p)
	if err != nil && p.state.Load() != stateOrphan {
		t.shut(p, CloseLost)
	}
	return err
}

// shut closes a session physically; its place stays taken.
func (t *Token) shut(p *physical, cause CloseCause) (left bool) {
	if p.open && !t.outdated(p) {
		p.open = false
		_, left = p.call(context.Background(), t.cache.opTimeout(), work{step: p.closeHandle})
	}
	if !left {
		close(p.work)
	}
	t.counts.closed(cause)
	t.emit(Event{Kind: SessionClosed, Cause: cause})
	return left
}

// discard closes a session physically and gives up its place.
func (t *Token) discard(p *physical, cause CloseCause) {
	if left := t.shut(p, cause); !left && !p.spare {
		t.cache.free()
	}
}
