package sessionpool

import (
	"context"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"
)

// library is a PKCS#11 library in use: loaded once per real path, initialised
// once however many pools rest on it, finalised when the last one leaves. It
// goes through initialise, restart and finalise one at a time, each on a
// goroutine of its own, which may hang without holding a lock; those of a library
// that is [Config.Direct] on the goroutine that wants it.
type library struct {
	path    string
	args    string
	env     []string
	private bool

	mu        sync.Mutex
	wrap      func(Module) Module
	direct    bool   // whoever wants a change makes it
	native    Module // what the loader gave, without decoration
	instance  *instance
	pools     int                 // pools that rest on the library
	tokens    map[*Token]struct{} // those that a pool uses
	ready     bool                // initialised
	ours      bool                // by us, and not finalised since, so that we may
	changing  *change             // the change that goes on, or nil
	restarted time.Time           // when it was last restarted
	used      bool                // by a pool that found its token

	handles handles

	// generation counts initialisations: handles of an older one are dead. live
	// is the generation while the library is ready, else 0. Both change with mu
	// held, and are read on the way of every call.
	generation atomic.Uint64
	live       atomic.Uint64
}

// setReady is called with l.mu held.
func (l *library) setReady(ready bool) {
	l.ready = ready
	if ready {
		l.live.Store(l.generation.Load())
	} else {
		l.live.Store(0)
	}
}

// change is a step that only one goroutine at a time takes with a library.
type change struct {
	done chan struct{}
	err  error // valid once done is closed
}

// libraries holds every shared library that was ever used, by real path. They
// are never unloaded, so an entry is made once.
var libraries = struct {
	sync.Mutex
	byPath map[string]*library
}{byPath: map[string]*library{}}

// openLibrary finds or loads the library of a configuration, for one more pool.
func openLibrary(cfg *Config) (*library, error) {
	if cfg.Private {
		return openPrivate(cfg)
	}
	libraries.Lock()
	defer libraries.Unlock()
	l := libraries.byPath[cfg.Module]
	if l == nil {
		l = newLibrary(cfg)
		if err := l.load(); err != nil {
			return nil, err
		}
		libraries.byPath[cfg.Module] = l
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.pools > 0 && l.args != cfg.ModuleArgs {
		return nil, fail(ErrConfig, nil, "the PKCS#11 library %s is in use with another initialisation string", cfg.Module)
	}
	if l.pools == 0 {
		l.args, l.restarted = cfg.ModuleArgs, time.Time{}
		if l.wrap != nil || cfg.Wrap != nil || l.direct != cfg.Direct {
			l.wrap, l.direct = cfg.Wrap, cfg.Direct
			l.instance = l.newInstance(l.native, l.instance.gate)
		}
	}
	l.pools++
	return l, nil
}

// parked holds the private instances that nobody uses any more. They cannot be
// unloaded, so the next pool that wants the same gets one of them.
var parked = struct {
	sync.Mutex
	byKey map[string][]*library
}{byKey: map[string][]*library{}}

// key is what a private instance was made from.
func (l *library) key() string {
	return strings.Join(append([]string{l.path, l.args}, l.env...), "\x00")
}

func openPrivate(cfg *Config) (*library, error) {
	l := newLibrary(cfg)
	key := l.key()
	parked.Lock()
	if idle := parked.byKey[key]; len(idle) > 0 {
		l = idle[len(idle)-1]
		parked.byKey[key] = idle[:len(idle)-1]
	}
	parked.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pools, l.wrap, l.direct, l.restarted = 1, cfg.Wrap, cfg.Direct, time.Time{}
	if l.native == nil {
		return l, l.load()
	}
	l.instance = l.newInstance(l.native, l.instance.gate)
	return l, nil
}

// park keeps a private instance that is finalised and has no call inside.
func (l *library) park() {
	l.mu.Lock()
	idle := l.private && l.pools == 0 && !l.ready && l.changing == nil && l.instance.inside.Load() == 0
	l.mu.Unlock()
	if idle {
		parked.Lock()
		defer parked.Unlock()
		parked.byKey[l.key()] = append(parked.byKey[l.key()], l)
	}
}

func newLibrary(cfg *Config) *library {
	return &library{
		path: cfg.Module, args: cfg.ModuleArgs, env: cfg.ModuleEnv,
		private: cfg.Private, wrap: cfg.Wrap, direct: cfg.Direct, tokens: map[*Token]struct{}{},
	}
}

func (l *library) load() error {
	n, err := l.open(l.private)
	if err != nil {
		return err
	}
	l.native = n
	l.instance = l.newInstance(n, newGate())
	return nil
}

// open loads the library in its environment: p11-kit's client reads its address
// as soon as it is asked for its functions.
func (l *library) open(private bool) (*native, error) {
	restore, err := withEnv(l.env)
	if err != nil {
		return nil, err
	}
	defer restore()
	return openNative(l.path, private, l.direct)
}

// use waits until the library is initialised, and returns the instance and its
// generation.
func (l *library) use(ctx context.Context, timeout time.Duration) (*instance, uint64, error) {
	for {
		l.mu.Lock()
		if l.ready && l.changing == nil {
			defer l.mu.Unlock()
			return l.instance, l.generation.Load(), nil
		}
		c := l.begin(l.initialise)
		if err := c.wait(ctx, timeout, "initialising the PKCS#11 library"); err != nil {
			return nil, 0, err
		}
	}
}

// begin starts step, or joins the change that goes on. It is called with l.mu
// held, and gives it up.
func (l *library) begin(step func() error) *change {
	c, direct := l.changing, l.direct
	if c != nil {
		l.mu.Unlock()
		return c
	}
	c = &change{done: make(chan struct{})}
	l.changing = c
	l.mu.Unlock()
	run := func() {
		c.err = step()
		l.mu.Lock()
		l.changing = nil
		l.mu.Unlock()
		close(c.done)
	}
	if direct {
		run()
	} else {
		go run()
	}
	return c
}

func (c *change) wait(ctx context.Context, timeout time.Duration, what string) error {
	select {
	case <-c.done:
		return c.err
	default:
	}
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-c.done:
		return c.err
	case <-ctx.Done():
		return waitError(ctx, what)
	case <-timer.C:
		return fail(ErrTimeout, nil, "%s took longer than %v", what, timeout)
	}
}

// settle waits for the change that goes on, if one does.
func (l *library) settle(timeout time.Duration) {
	l.mu.Lock()
	c := l.changing
	l.mu.Unlock()
	if c != nil {
		// Before a restart does anything it waits for calls.
		_ = c.wait(context.Background(), 2*timeout, "waiting for the PKCS#11 library")
	}
}

// initialise calls C_Initialize, and adopts a library that somebody else in
// the process has initialised.
func (l *library) initialise() error {
	env := l.env
	if filepath.Base(l.path) == "p11-kit-client.so" {
		env = nil // it was read with the load: an HSM that hangs now keeps no other one waiting for the environment
	}
	restore, err := withEnv(env)
	if err != nil {
		return err
	}
	defer restore()
	var opts []pkcs11.InitializeOption
	if l.args != "" {
		opts = append(opts, pkcs11.InitializeWithReserved(foreverString(l.args)))
	}
	l.generation.Add(1)
	err = l.current().module.Initialize(opts...)
	adopted := isCode(err, pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)
	if err != nil && !adopted {
		return fail(ErrSession, err, "the PKCS#11 library %s does not initialise", l.path)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ours = l.ours || !adopted
	l.setReady(true)
	return nil
}

func (l *library) current() *instance {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.instance
}

// lost notes that somebody finalised the library of that generation.
func (l *library) lost(generation uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.generation.Load() == generation && l.changing == nil {
		l.setReady(false)
		l.ours = false
	}
}

// restart finalises and initialises the library, which is the one way back for
// modules whose device died. Only a library that we initialised, and on which no
// second token rests, may be restarted, and not time and again.
func (l *library) restart(ctx context.Context, generation uint64, timeout time.Duration) error {
	l.mu.Lock()
	allowed := l.generation.Load() == generation && l.ours && l.ready && (l.private || len(l.tokens) == 1)
	if !allowed || time.Since(l.restarted) < restartInterval {
		l.mu.Unlock()
		return nil
	}
	l.restarted = time.Now()
	c := l.begin(func() error { return l.reinitialise(generation, timeout) })
	// Twice the time: it may have to wait for calls before it begins.
	return c.wait(ctx, 2*timeout, "restarting the PKCS#11 library")
}

// restartInterval keeps callers that meet a dead HSM from finalising it all the
// time under those for whom it has just come back.
const restartInterval = 100 * time.Millisecond

// reinitialise is the step of a restart.
func (l *library) reinitialise(generation uint64, timeout time.Duration) error {
	l.mu.Lock()
	in, stale := l.instance, l.generation.Load() != generation
	l.mu.Unlock()
	if stale {
		return nil
	}
	if !in.drain(timeout) {
		if l.private {
			return l.replace()
		}
		in.reopen()
		return fail(ErrTimeout, nil, "calls hang in the PKCS#11 library %s, it cannot be restarted", l.path)
	}
	if !l.private {
		if others, err := l.leaveToOthers(in, timeout); others || err != nil {
			l.generation.Add(1)
			l.mu.Lock()
			l.setReady(true)
			l.mu.Unlock()
			in.reopen()
			return err
		}
	}
	l.mu.Lock()
	l.setReady(false)
	l.ours = false
	l.mu.Unlock()
	_, err := await(context.Background(), in.direct, timeout, "finalising the PKCS#11 library", func() (struct{}, error) {
		return struct{}{}, in.module.Finalize()
	})
	if err != nil && l.private {
		return l.replace()
	}
	err = l.initialise()
	in.reopen()
	return err
}

// leaveToOthers closes what sessions of ours there are before C_Finalize, and
// reports whether somebody else in the process has some, which would die with it.
// A library that cannot close sessions any more is of no use to them either.
func (l *library) leaveToOthers(in *instance, timeout time.Duration) (bool, error) {
	ctx := context.Background()
	if !in.direct {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	m := in.module
	return await(ctx, in.direct, timeout, "closing sessions", func() (bool, error) {
		for _, h := range l.handles.all() {
			if ctx.Err() != nil {
				return false, nil // nobody waits; the numbers may be others' by now
			}
			if err := m.CloseSession(h); err != nil && !gone(err) {
				return false, nil
			}
		}
		return inUse(m), nil
	})
}

// replace abandons a private instance that hangs and loads a fresh copy.
func (l *library) replace() error {
	n, err := l.open(true)
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.native, l.instance = n, l.newInstance(n, newGate())
	l.setReady(false)
	l.mu.Unlock()
	return l.initialise()
}

// release gives up one pool's hold. The last one finalises the library, if it
// is ours, no call hangs in it, and nobody else in the process has sessions.
func (l *library) release(ctx context.Context, timeout time.Duration) error {
	defer l.park()
	l.mu.Lock()
	l.pools--
	if l.pools > 0 || !l.ready || l.changing != nil {
		l.mu.Unlock()
		return nil
	}
	if !l.ours {
		// Its owner may finalise it at any time: the next pool looks again.
		l.setReady(false)
		l.mu.Unlock()
		return nil
	}
	c := l.begin(func() error { return l.finalise(timeout) })
	return c.wait(ctx, 2*timeout, "finalising the PKCS#11 library")
}

// finalise is the step of the last release. A pool that came meanwhile keeps
// the library alive, or waits in use until this ends.
func (l *library) finalise(timeout time.Duration) (err error) {
	in := l.current()
	if !in.drain(timeout) {
		in.reopen()
		return fail(ErrTimeout, nil, "calls hang in the PKCS#11 library %s, it was not finalised", l.path)
	}
	defer in.reopen()
	l.mu.Lock()
	used, others := l.used, false
	l.mu.Unlock()
	if used && !l.private {
		others, err = l.leaveToOthers(in, timeout)
		l.generation.Add(1)
	}
	l.mu.Lock()
	needed := l.pools > 0
	l.setReady(needed)
	// What is left to others is theirs: they may finalise it at any time.
	l.ours, l.used = needed || err != nil, needed
	l.mu.Unlock()
	if needed || others || err != nil {
		return err
	}
	err = in.module.Finalize()
	if isCode(err, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED) {
		return nil
	}
	return err
}

// inUse reports whether somebody else in the process has sessions. Ours are
// closed by now: a token that still counts some, or on which a new session is
// logged in at once, is theirs too.
func inUse(m Module) bool {
	slots, err := m.GetSlotList(true)
	if err != nil {
		return false
	}
	for _, slot := range slots {
		info, err := m.GetTokenInfo(slot)
		switch {
		case err != nil || info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0:
		case info.SessionCount != unavailable:
			if info.SessionCount > 0 {
				return true
			}
		case info.Flags&pkcs11.CKF_LOGIN_REQUIRED != 0 && loggedInBySomebody(m, slot):
			return true
		}
	}
	return false
}

func loggedInBySomebody(m Module, slot uint) bool {
	h, err := m.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		return false
	}
	info, err := m.GetSessionInfo(h)
	_ = m.CloseSession(h) // it held nothing
	return err == nil && !isPublic(info)
}

// unavailable is CK_UNAVAILABLE_INFORMATION.
const unavailable = ^uint(0)
