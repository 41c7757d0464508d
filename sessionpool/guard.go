package sessionpool

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"
)

// guard is the Module that a session's functions get. It stands at each call
// into the library and notes when it began, so that a hang can be told from a
// function that makes many calls; whether any call of this run has reached the
// token; and the worst return code, whatever the function makes of it.
// Everything but started belongs to the session's goroutine.
type guard struct {
	instance   *instance
	generation uint64         // that its handle is good for
	user       bool           // the session is to be logged in
	direct     bool           // the caller's goroutine makes the calls, lots aside
	epoch      *atomic.Uint64 // the token's
	login      uint64         // the epoch in which the present search began
	open       bool           // a run is going on
	run        work           // what it does
	reached    bool           // a call of this run succeeded
	failed     error          // the worst failure of this run
	started    atomic.Int64   // when the present call began (clock), 0: none
}

var _ Module = (*guard)(nil)

var clockBase = time.Now()

// clock is a monotonic time that is never 0.
func clock() int64 { return int64(time.Since(clockBase)) + 1 }

func (g *guard) beginRun(w work) { g.run, g.open, g.reached, g.failed = w, true, false, nil }
func (g *guard) endRun()         { g.run, g.open = work{}, false }

var errEnded = fail(ErrClosed, nil, "the Module of Session.Do was used after the function returned, or while SignLots uses the session")

func (g *guard) enter() (Module, error) {
	if !g.open {
		return nil, errEnded
	}
	if err := g.instance.enterFor(g.generation); err != nil {
		g.note(err)
		return nil, err
	}
	g.started.Store(clock())
	return g.instance.module, nil
}

func (g *guard) leave(err error) error {
	g.started.Store(0)
	g.instance.leave()
	g.note(err)
	return err
}

func (g *guard) note(err error) {
	if err == nil {
		g.reached = true
	} else if g.failed == nil || classify(err) > classify(g.failed) {
		g.failed = err
	}
}

// do makes a call without a result, get one with a result.
func (g *guard) do(call func(Module) error) error {
	m, err := g.enter()
	if err != nil {
		return err
	}
	return g.leave(call(m))
}

func get[T any](g *guard, call func(Module) (T, error)) (T, error) {
	m, err := g.enter()
	if err != nil {
		var none T
		return none, err
	}
	v, err := call(m)
	return v, g.leave(err)
}

// refuse answers what a function of one session must not do to all.
func refuse(function string) error {
	return fail(ErrUnsupported, nil, "%s is not for functions given to Session.Do", function)
}

func (g *guard) Initialize(...pkcs11.InitializeOption) error { return refuse("C_Initialize") }
func (g *guard) Finalize() error                             { return refuse("C_Finalize") }
func (g *guard) Logout(pkcs11.SessionHandle) error           { return refuse("C_Logout") }
func (g *guard) CloseSession(pkcs11.SessionHandle) error     { return refuse("C_CloseSession") }
func (g *guard) OpenSession(uint, uint) (pkcs11.SessionHandle, error) {
	return 0, refuse("C_OpenSession")
}

// Login is for the context-specific login of CKA_ALWAYS_AUTHENTICATE; the user's
// login is the pool's own. Both cost one attempt where the PIN is wrong.
func (g *guard) Login(h pkcs11.SessionHandle, userType uint, pin string) error {
	if userType != pkcs11.CKU_CONTEXT_SPECIFIC {
		return refuse("C_Login other than CKU_CONTEXT_SPECIFIC")
	}
	if !g.open {
		return errEnded
	}
	return g.run.pool.authorise(g.run.ctx, g, h, pin)
}

func (g *guard) GetInfo() (pkcs11.Info, error) {
	return get(g, func(m Module) (pkcs11.Info, error) { return m.GetInfo() })
}

func (g *guard) GetSlotList(tokenPresent bool) ([]uint, error) {
	return get(g, func(m Module) ([]uint, error) { return m.GetSlotList(tokenPresent) })
}

func (g *guard) GetSlotInfo(slot uint) (pkcs11.SlotInfo, error) {
	return get(g, func(m Module) (pkcs11.SlotInfo, error) { return m.GetSlotInfo(slot) })
}

func (g *guard) GetTokenInfo(slot uint) (pkcs11.TokenInfo, error) {
	return get(g, func(m Module) (pkcs11.TokenInfo, error) { return m.GetTokenInfo(slot) })
}

func (g *guard) GetMechanismList(slot uint) ([]*pkcs11.Mechanism, error) {
	return get(g, func(m Module) ([]*pkcs11.Mechanism, error) { return m.GetMechanismList(slot) })
}

func (g *guard) GetMechanismInfo(slot uint, mech []*pkcs11.Mechanism) (pkcs11.MechanismInfo, error) {
	return get(g, func(m Module) (pkcs11.MechanismInfo, error) { return m.GetMechanismInfo(slot, mech) })
}

func (g *guard) GetSessionInfo(h pkcs11.SessionHandle) (pkcs11.SessionInfo, error) {
	return get(g, func(m Module) (pkcs11.SessionInfo, error) { return m.GetSessionInfo(h) })
}

// FindObjectsInit, and FindObjectsFinal in the end, make sure that the session
// is logged in: else a token shows no private objects, and does not say why.
func (g *guard) FindObjectsInit(h pkcs11.SessionHandle, template []*pkcs11.Attribute) error {
	return g.do(func(m Module) error {
		g.login = g.epoch.Load()
		if err := g.stillLoggedIn(m, h); err != nil {
			return err
		}
		return m.FindObjectsInit(h, template)
	})
}

func (g *guard) FindObjectsFinal(h pkcs11.SessionHandle) error {
	return g.do(func(m Module) error {
		return errors.Join(m.FindObjectsFinal(h), g.stillLoggedIn(m, h))
	})
}

func (g *guard) stillLoggedIn(m Module, h pkcs11.SessionHandle) error {
	if !g.user {
		return nil
	}
	info, err := m.GetSessionInfo(h)
	if err == nil && (isPublic(info) || g.login != g.epoch.Load()) {
		err = pkcs11.Error(pkcs11.CKR_USER_NOT_LOGGED_IN)
	}
	return err
}

func (g *guard) FindObjects(h pkcs11.SessionHandle, limit int) ([]pkcs11.ObjectHandle, bool, error) {
	m, err := g.enter()
	if err != nil {
		return nil, false, err
	}
	found, more, err := m.FindObjects(h, limit)
	return found, more, g.leave(err)
}

func (g *guard) GetAttributeValue(h pkcs11.SessionHandle, o pkcs11.ObjectHandle, a []*pkcs11.Attribute) ([]*pkcs11.Attribute, error) {
	return get(g, func(m Module) ([]*pkcs11.Attribute, error) { return m.GetAttributeValue(h, o, a) })
}

func (g *guard) CreateObject(h pkcs11.SessionHandle, template []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	return get(g, func(m Module) (pkcs11.ObjectHandle, error) { return m.CreateObject(h, template) })
}

func (g *guard) DestroyObject(h pkcs11.SessionHandle, o pkcs11.ObjectHandle) error {
	return g.do(func(m Module) error { return m.DestroyObject(h, o) })
}

func (g *guard) GenerateKey(h pkcs11.SessionHandle, mech []*pkcs11.Mechanism, template []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	return get(g, func(m Module) (pkcs11.ObjectHandle, error) { return m.GenerateKey(h, mech, template) })
}

func (g *guard) GenerateKeyPair(h pkcs11.SessionHandle, mech []*pkcs11.Mechanism, public, private []*pkcs11.Attribute) (pkcs11.ObjectHandle, pkcs11.ObjectHandle, error) {
	m, err := g.enter()
	if err != nil {
		return 0, 0, err
	}
	pub, priv, err := m.GenerateKeyPair(h, mech, public, private)
	return pub, priv, g.leave(err)
}

func (g *guard) SignInit(h pkcs11.SessionHandle, mech []*pkcs11.Mechanism, key pkcs11.ObjectHandle) error {
	return g.do(func(m Module) error { return m.SignInit(h, mech, key) })
}

func (g *guard) Sign(h pkcs11.SessionHandle, data []byte) ([]byte, error) {
	return get(g, func(m Module) ([]byte, error) { return m.Sign(h, data) })
}

func (g *guard) DecryptInit(h pkcs11.SessionHandle, mech []*pkcs11.Mechanism, key pkcs11.ObjectHandle) error {
	return g.do(func(m Module) error { return m.DecryptInit(h, mech, key) })
}

func (g *guard) Decrypt(h pkcs11.SessionHandle, ciphertext []byte) ([]byte, error) {
	return get(g, func(m Module) ([]byte, error) { return m.Decrypt(h, ciphertext) })
}

// SignSingle is on the path of every token and makes no closure.
func (g *guard) SignSingle(dst []byte, h pkcs11.SessionHandle, mech *pkcs11.Mechanism, key pkcs11.ObjectHandle, data []byte, size int) ([]byte, error) {
	m, err := g.enter()
	if err != nil {
		return nil, err
	}
	sig, err := m.SignSingle(dst, h, mech, key, data, size)
	return sig, g.leave(err)
}

// SignLots is one call only where nobody waits for calls to come back. It does not
// hold up those who restart the library or close the pool: for them it ends early.
func (g *guard) SignLots(ctx context.Context, h pkcs11.SessionHandle, mech *pkcs11.Mechanism, key pkcs11.ObjectHandle, size int, next func() *Lot, done func(*Lot)) (err error) {
	defer func() {
		if err != nil && ctx.Err() != nil && errors.Is(err, ctx.Err()) {
			err = waitError(ctx, "signing")
		}
	}()
	if !g.direct {
		return SignEach(ctx, g, h, mech, key, size, next, done)
	}
	m, err := g.enter()
	if err != nil {
		return err
	}
	// next and done are the caller's: they may panic, and must not use the session,
	// which is at work.
	g.open = false
	defer func() {
		g.open = true
		_ = g.leave(err)
	}()
	return m.SignLots(ctx, h, mech, key, size, func() *Lot {
		if g.instance.shut.Load() || g.run.pool.isClosed() {
			return nil
		}
		return next()
	}, done)
}
