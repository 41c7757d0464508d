package sessionpool

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/miekg/pkcs11"
)

// outdated reports whether a session's handle is certainly dead, and may be
// another session's by now: it must be neither used nor closed.
func (t *Token) outdated(p *physical) bool {
	return p.generation != t.library.live.Load() || p.replaced.Load()
}

// handles knows whose each session handle is. Modules give the numbers of dead
// sessions to new ones, whatever their token, so a second claim tells that the
// first session died without our knowing: all were closed, or the library was
// initialised anew.
type handles struct {
	mu    sync.Mutex
	owner map[pkcs11.SessionHandle]*physical
}

func (h *handles) claim(p *physical) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.owner == nil {
		h.owner = map[pkcs11.SessionHandle]*physical{}
	}
	if before := h.owner[p.handle]; before != nil {
		before.replaced.Store(true)
	}
	h.owner[p.handle] = p
}

// all lists the sessions that are open as far as we know.
func (h *handles) all() []pkcs11.SessionHandle {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Collect(maps.Keys(h.owner))
}

// oldestCall is how long the oldest call lasts that goes on in a session of a token.
func (h *handles) oldestCall(t *Token) (oldest time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, p := range h.owner {
		if began := p.guard.started.Load(); p.token == t && began != 0 {
			oldest = max(oldest, time.Duration(clock()-began))
		}
	}
	return oldest
}

func (h *handles) forget(p *physical) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.owner[p.handle] == p {
		delete(h.owner, p.handle)
	}
}

// failuresBeforeRestart device errors in a row make us initialise the library
// anew: some modules, after their device died, answer nothing else until then.
const failuresBeforeRestart = 2

// openPhysical opens a session, and brings token and library back if they were
// lost: it looks for the token again, and restarts a library whose device does
// not work.
func (t *Token) openPhysical(ctx context.Context, pool *Pool, k kind, anchor bool) (*physical, error) {
	const tries = 4
	for try := 1; ; try++ {
		if t.failures.Load() >= failuresBeforeRestart {
			if err := t.restart(ctx, pool); err != nil && ctx.Err() == nil {
				return nil, t.down(err)
			}
		}
		p, err := t.tryOpen(ctx, pool, k, anchor, try > 1)
		if err == nil || !errors.Is(err, ErrSession) || isCode(err, pkcs11.CKR_SESSION_COUNT) {
			return p, err
		}
		switch classify(err) {
		case tokenGone, hsmDown:
			t.failures.Add(1)
		}
		switch {
		case ctx.Err() != nil: // which says nothing about the HSM
			return nil, interrupted(ctx, err)
		case try == tries:
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

func (t *Token) tryOpen(ctx context.Context, pool *Pool, k kind, anchor, again bool) (*physical, error) {
	in, generation, slot, err := t.locate(ctx, &pool.cfg, again)
	if err != nil {
		return nil, err
	}
	p := t.newPhysical(k, in, generation, pool.cfg.Direct)
	p.anchor = anchor
	err, left := p.call(ctx, pool.cfg.OpTimeout, work{step: func() error { return p.openHandle(slot) }})
	if left {
		return nil, err
	}
	if err != nil {
		close(p.work)
		if classify(err) == moduleLost && !errors.Is(err, errShut) {
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
// A session that is lost while it is opened is no reason to give up. All of it
// takes no longer than one call may, once the PIN is there.
func (t *Token) openFor(ctx context.Context, pool *Pool, k kind) (*physical, error) {
	due := !k.public() && t.pinDue(pool)
	if due {
		// A person may have to type it: that takes as long as it takes.
		pin, err := readPIN(ctx, pool.pinSource())
		if err != nil {
			return nil, err
		}
		ctx = context.WithValue(ctx, pinKey{}, pin)
	}
	if !pool.cfg.Direct || !due { // else there is nothing left to wait for
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, pool.cfg.OpTimeout, &slowError{pool.cfg.OpTimeout})
		defer cancel()
	}
	const tries = 64
	for try := 1; ; try++ {
		p, err := t.openOnce(ctx, pool, k)
		c := classify(err)
		switch {
		case c != sessionBroken && c != loginLost && c != moduleLost, try == tries:
			return p, err
		case ctx.Err() != nil:
			return nil, interrupted(ctx, err)
		}
	}
}

func (t *Token) openOnce(ctx context.Context, pool *Pool, k kind) (*physical, error) {
	if k.public() {
		return t.openPhysical(ctx, pool, k, false)
	}
	if err := t.ensureLogin(ctx, pool, nil); err != nil {
		return nil, err
	}
	p, err := t.openPhysical(ctx, pool, k, false)
	if isCode(err, pkcs11.CKR_SESSION_COUNT) && t.makeRoom(ctx) {
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
func (t *Token) makeRoom(ctx context.Context) bool {
	if t.cache.takenPlaces() > 1 {
		return false
	}
	t.login.settle(ctx)
	anchor := t.takeAnchor()
	if anchor == nil {
		return false
	}
	t.login.mu.Lock()
	t.login.single = true
	t.login.mu.Unlock()
	t.shut(ctx, anchor, CloseLimit)
	return true
}

// logInFor makes sure that a session is in a user's state. What the token says
// of the session counts, not what we remember of the login: somebody else may
// have logged out. On failure the session is gone.
func (t *Token) logInFor(ctx context.Context, pool *Pool, p *physical) error {
	in, err, left := p.check(ctx, pool.cfg.OpTimeout)
	if err == nil {
		if !in {
			t.loginLost()
		}
		err = t.ensureLogin(ctx, pool, p)
		left = p.orphaned()
	} else if classify(err).sessionFault() {
		err = fail(ErrSession, err, "%s: a new session is lost already", t.name)
		t.login.doubt()
	}
	if err != nil && !left {
		t.shut(ctx, p, CloseLost)
	}
	return err
}

// shut closes a session physically, and waits for that until ctx ends. Its place
// stays taken, unless it hangs: then left says that it is an orphan.
func (t *Token) shut(ctx context.Context, p *physical, cause CloseCause) (left bool) {
	left = t.end(ctx, p)
	t.tellClosed(cause)
	return left
}

func (t *Token) tellClosed(cause CloseCause) {
	t.counts.closed(cause)
	t.emit(Event{Kind: SessionClosed, Cause: cause})
}

// end is shut without telling.
func (t *Token) end(ctx context.Context, p *physical) (left bool) {
	if p.open && !t.outdated(p) {
		p.open = false
		t.login.mayEnd()
		_, left = p.call(ctx, t.cache.opTimeout(), work{step: p.closeHandle})
	}
	if !left {
		close(p.work)
		t.library.handles.forget(p)
	}
	return left
}

// keep puts a session into the cache, if there is room for it.
func (t *Token) keep(p *physical) {
	if !t.cache.put(p) {
		t.discard(p, CloseLimit)
	}
}

// discard closes a session physically and gives up its place, before it tells: who
// hears of it may want the place.
func (t *Token) discard(p *physical, cause CloseCause) {
	if left := t.end(context.Background(), p); !left && p.place {
		t.cache.free()
	}
	t.tellClosed(cause)
}

// discardAll discards sessions side by side: an HSM that hangs may hold each of
// them for as long as a call may take.
func (t *Token) discardAll(all []*physical, cause CloseCause) {
	if len(all) == 1 {
		t.discard(all[0], cause)
		return
	}
	var group sync.WaitGroup
	for _, p := range all {
		group.Go(func() { t.discard(p, cause) })
	}
	group.Wait()
}
