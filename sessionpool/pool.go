package sessionpool

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"
)

// Pool hands out sessions on one token. Pools on the same token share its
// login, its cache and its limits. A Pool is safe for concurrent use.
type Pool struct {
	cfg     Config
	library *library
	token   *Token
	once    bool          // its PIN is good for one login
	known   atomic.Uint64 // the login in which its PIN was found right
	closing chan struct{} // closed when Close begins
	pending sync.WaitGroup

	mu      sync.Mutex
	pin     PINSource
	closed  bool
	inUse   int
	drained chan struct{} // closed when the last session of a closed pool is back
	down    *flight       // the Close that goes on or is done
}

var _ Source = (*Pool)(nil)

var errClosedPool = fail(ErrClosed, nil, "the session pool is closed")

// New loads and initialises the module if nobody has, and finds the token; the
// login waits for the first session. It takes Config.OpTimeout at most, unless the
// library is [Config.Direct].
//
// Errors match [ErrConfig] when the configuration is wrong or no token or
// several match it, [ErrSession] or [ErrTimeout] when the module does not
// answer.
func New(cfg Config) (*Pool, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	return newPool(context.Background(), cfg, false)
}

func newPool(ctx context.Context, cfg Config, once bool) (*Pool, error) {
	p := &Pool{cfg: cfg, once: once, pin: cfg.PIN, closing: make(chan struct{}), drained: make(chan struct{})}
	var err error
	if p.library, err = openLibrary(&p.cfg); err != nil {
		return nil, err
	}
	if p.token, err = joinToken(ctx, p.library, p); err != nil {
		return nil, errors.Join(err, p.library.release(ctx, cfg.OpTimeout))
	}
	return p, nil
}

// Acquire hands out a session: a cached one of the same kind, the newest first,
// or a new one; at the limit it waits for one until ctx ends. Waiters are served
// in their order.
//
// Errors match [ErrClosed]; [ErrPIN]; [ErrSession] when the HSM does not answer;
// [ErrTimeout] when it does not answer in time or ctx reaches its deadline; or
// [ErrUnsupported].
func (p *Pool) Acquire(ctx context.Context, opts ...Option) (*Session, error) {
	r := newRequest(opts)
	if err := ctx.Err(); err != nil {
		return nil, waitError(ctx, "acquiring a session")
	}
	switch {
	case r.has(optEncrypted) && p.cfg.Plaintext:
		return nil, fail(ErrUnsupported, ErrUnsuitable, "%s: the way to this HSM is not encrypted", p.token.name)
	case slices.ContainsFunc(r.avoid, p.token.sameHSM):
		return nil, fail(ErrSession, ErrUnsuitable, "%s: it was asked before, or is left out", p.token.name)
	}
	if err := p.entered(); err != nil {
		return nil, err
	}
	s, err := p.acquire(ctx, r)
	if err != nil {
		p.left()
		return nil, err
	}
	return s, nil
}

func (p *Pool) acquire(ctx context.Context, r request) (*Session, error) {
	if r.once {
		return p.oneTime(ctx, r)
	}
	var k kind
	if r.has(optReadWrite) {
		k |= kindReadWrite
	}
	if p.cfg.PIN == nil || r.has(optPublic) {
		k |= kindPublic
	}
	ph, err := p.obtain(ctx, k, r)
	if err != nil {
		return nil, err
	}
	ph.bypass = r.has(optBypass)
	return newSession(p, ph), nil
}

// obtain gets a physical session, from the cache or from the token.
func (p *Pool) obtain(ctx context.Context, k kind, r request) (*physical, error) {
	t := p.token
	fresh := r.has(optBypass) || p.cfg.DisableCache
	for {
		found, evict, err := t.cache.take(ctx, p.closing, r.giveUp, k, fresh, r.has(optIdle))
		if err != nil {
			return nil, err
		}
		if evict != nil {
			if t.shut(ctx, evict, CloseLimit) { // its place went with it
				return nil, hangs(ctx, t)
			}
		}
		if found != nil {
			ph, err := p.vet(ctx, found)
			if err != nil {
				return nil, err
			}
			if ph != nil {
				t.counts.reused.Add(1)
				return ph, nil
			}
			continue
		}
		ph, err := t.openFor(ctx, p, k)
		if isCode(err, pkcs11.CKR_SESSION_COUNT) && t.cache.full() {
			t.emit(Event{Kind: LimitLowered, Err: err})
			continue
		}
		if err != nil {
			t.cache.free()
			return nil, err
		}
		ph.place, ph.resets = true, t.resets.Load()
		return ph, nil
	}
}

// hangs is the error of a caller that left a session which is being closed.
func hangs(ctx context.Context, t *Token) error {
	if ctx.Err() != nil {
		return waitError(ctx, t.name+": closing a session")
	}
	return fail(ErrTimeout, nil, "%s: a session hangs", t.name)
}

// vet makes sure that a session from the cache can be used, or closes it. An HSM
// that does not answer one session is not asked with the next.
func (p *Pool) vet(ctx context.Context, ph *physical) (*physical, error) {
	t := p.token
	if t.outdated(ph) {
		t.discard(ph, CloseLost)
		return nil, nil
	}
	if ph.resets != t.resets.Load() { // it was released as Reset began
		t.discard(ph, CloseAsked)
		return nil, nil
	}
	if ph.suspicion != t.suspicion.Load() {
		in, err, left := ph.check(ctx, p.cfg.OpTimeout)
		switch {
		case left:
			return nil, err
		case err != nil:
			t.later(p, func() { t.discard(ph, CloseLost) })
			return nil, nil
		case !in && !ph.kind.public() && t.needsLogin():
			t.loginLost() // Do logs in again
		}
	}
	if !ph.kind.public() && t.login.done.Load() && !t.login.known(p) {
		// Another pool logged in.
		if err := t.ensureLogin(ctx, p, ph); err != nil {
			if !ph.orphaned() {
				t.keep(ph)
			}
			return nil, err
		}
	}
	return ph, nil
}

// oneTime makes a session with a login of its own, on a private instance of the
// module.
func (p *Pool) oneTime(ctx context.Context, r request) (*Session, error) {
	if r.pin == "" {
		return nil, fail(ErrPIN, nil, "the one-time PIN is empty; it was not sent")
	}
	info := p.token.Info()
	cfg := p.cfg
	cfg.Private, cfg.PIN, cfg.PINGuard = true, StaticPIN(r.pin), &PINGuard{}
	cfg.MaxSessions, cfg.OnEvent = 1, nil
	cfg.TokenLabel, cfg.TokenSerial, cfg.Slot = info.Label, info.Serial, nil
	inner, err := newPool(ctx, cfg, true)
	switch {
	case err == nil:
	case ctx.Err() != nil || errors.Is(err, ErrTimeout):
		return nil, err
	default:
		return nil, fail(ErrUnsupported, err, "%s: a one-time PIN needs a second instance of the PKCS#11 library, which does not work", p.token.name)
	}
	opts := []Option{Bypass()}
	if r.has(optReadWrite) {
		opts = append(opts, ReadWrite())
	}
	s, err := inner.Acquire(ctx, opts...)
	if err != nil {
		return nil, errors.Join(err, inner.Close(ctx))
	}
	one := newSession(inner, s.physical)
	one.inner = p
	return one, nil
}

// endOneTime closes the private instance that was made for the session.
func (s *Session) endOneTime() {
	outer, inner := s.inner, s.pool
	defer outer.left()
	if !s.lost {
		inner.token.discard(s.physical, CloseAsked)
	}
	inner.left()
	ctx, cancel := context.WithTimeout(context.Background(), inner.cfg.OpTimeout)
	defer cancel()
	_ = inner.Close(ctx) // its sessions are closed; a hang was counted
}

// With runs fn with a session that is released on every path.
func (p *Pool) With(ctx context.Context, fn func(*Session) error, opts ...Option) error {
	s, err := p.Acquire(ctx, opts...)
	if err != nil {
		return err
	}
	return using(s, fn)
}

// Token returns what the token said about itself when it was last found.
func (p *Pool) Token() TokenInfo { return p.token.Info() }

// SetPIN replaces the PIN source by a PIN, which is sent at the next login even
// if it was rejected before: a person has said again that it is right.
func (p *Pool) SetPIN(pin string) {
	p.mu.Lock()
	p.pin = StaticPIN(pin)
	p.mu.Unlock()
	if pin != "" {
		p.pinGuard().forget(digestOf(pin))
	}
}

// Reset closes every session of the token: idle ones now, those in use when they
// are released. The login ends with the last of them. The pool goes on working;
// the next Acquire opens new sessions.
func (p *Pool) Reset() {
	t := p.token
	t.resets.Add(1)
	t.discardAll(t.cache.expired(time.Time{}), CloseAsked)
	t.endUnusedLogin()
}

func (p *Pool) pinSource() PINSource {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pin
}

// entered counts a session in use, or being acquired.
func (p *Pool) entered() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return errClosedPool
	}
	p.inUse++
	return nil
}

func (p *Pool) left() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.inUse--
	if p.closed && p.inUse == 0 {
		close(p.drained)
	}
}

func (p *Pool) isClosed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.closed
}

// later runs a step in the background, which Close of the pool waits for.
func (t *Token) later(p *Pool, step func()) {
	t.aside.Add(1)
	p.pending.Add(1)
	go func() {
		defer p.pending.Done()
		defer t.aside.Add(-1)
		step()
	}()
}

// Close refuses new sessions, wakes those who wait for one with [ErrClosed],
// waits until the sessions in use are released, and then closes the physical
// sessions and finalises the module, unless other pools use them, or somebody
// else in the process does. When ctx ends first, Close returns its error and the
// rest happens when the last session is released. Closing twice is safe: the
// second call waits for the first.
func (p *Pool) Close(ctx context.Context) error {
	p.mu.Lock()
	f, idle := p.down, p.inUse == 0
	first := f == nil
	if first {
		f = &flight{done: make(chan struct{})}
		p.down, p.closed = f, true
		close(p.closing)
		if idle {
			close(p.drained)
		}
	}
	p.mu.Unlock()
	switch {
	case first && idle && p.library.current().direct && p.token.aside.Load() == 0:
		p.end(ctx) // there is nobody to wait for
		return f.err
	case first:
		go p.end(ctx)
	}
	select {
	case <-f.done:
		return f.err
	case <-ctx.Done():
		return waitError(ctx, "closing the session pool")
	}
}

// end is what Close has to do. It must not depend on whether the first caller of
// Close still waits for it.
func (p *Pool) end(ctx context.Context) {
	defer close(p.down.done)
	<-p.drained
	p.pending.Wait()
	ctx = context.WithoutCancel(ctx)
	p.down.err = errors.Join(p.token.leave(ctx, p), p.library.release(ctx, p.cfg.OpTimeout))
}
