package sessionpool_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// What can happen to sessions behind the pool's back.
var disasters = []struct {
	name   string
	strike func(t *testing.T, h *hsm)
}{
	{"one session was closed", func(_ *testing.T, h *hsm) { h.fault.CloseSession() }},
	{"all sessions were closed", func(_ *testing.T, h *hsm) { h.fault.CloseSessions() }},
	{"the user was logged out", func(_ *testing.T, h *hsm) { h.fault.LoseLogin() }},
	{"the module was finalised", func(t *testing.T, h *hsm) {
		if err := pkcs11.New(h.Module).Finalize(); err != nil {
			t.Fatal(err)
		}
	}},
	{"the module was finalised and initialised again", func(t *testing.T, h *hsm) {
		other := pkcs11.New(h.Module)
		if err := errors.Join(other.Finalize(), other.Initialize()); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = other.Finalize() })
	}},
}

func TestSessionsRecoverWithoutTheCallerNoticing(t *testing.T) {
	for _, d := range disasters {
		t.Run(d.name, func(t *testing.T) {
			h := newHSM(t)
			p := h.pool(t)
			pub := makeKey(t, p, "key")
			held := []*sessionpool.Session{acquire(t, p), acquire(t, p), acquire(t, p)}
			for _, s := range held {
				mustSign(t, s, pub, "key")
			}
			idle := []*sessionpool.Session{acquire(t, p), acquire(t, p)}
			for _, s := range idle {
				mustSign(t, s, pub, "key")
				s.Release()
			}
			d.strike(t, h)
			for _, s := range held {
				mustSign(t, s, pub, "key")
				s.Release()
			}
			for range 8 {
				s := acquire(t, p)
				defer s.Release()
				mustSign(t, s, pub, "key")
			}
		})
	}
}

func TestAKeyIsMadeOnceAlsoOverALostSession(t *testing.T) {
	for _, d := range disasters {
		t.Run(d.name, func(t *testing.T) {
			h := newHSM(t)
			p := h.pool(t)
			s := acquire(t, p, sessionpool.ReadWrite())
			defer s.Release()
			if err := ping(s); err != nil {
				t.Fatal(err)
			}
			d.strike(t, h)
			if _, err := generate(s, "once"); err != nil {
				t.Fatal(err)
			}
			// findKey fails unless there is exactly one.
			if err := s.Do(context.Background(), func(m sessionpool.Module, h pkcs11.SessionHandle) error {
				_, err := findKey(m, h, "once")
				return err
			}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestAFunctionThatReachedTheTokenIsNotRunAgain(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	s := acquire(t, p)
	defer s.Release()
	runs := 0
	err := s.Do(context.Background(), func(m sessionpool.Module, sh pkcs11.SessionHandle) error {
		runs++
		if _, err := m.GetSessionInfo(sh); err != nil {
			return err
		}
		h.fault.CloseSessions()
		_, err := m.GetSessionInfo(sh)
		return err
	})
	if runs != 1 || !errors.Is(err, sessionpool.ErrSession) || !errors.Is(err, pkcs11.Error(pkcs11.CKR_SESSION_HANDLE_INVALID)) {
		t.Errorf("%d runs with error %v, want 1 with ErrSession and the code", runs, err)
	}
	if err := ping(s); err != nil {
		t.Errorf("the session was not renewed for the next call: %v", err)
	}
}

func TestEachClassOfFailureHasItsConsequence(t *testing.T) {
	cases := []struct {
		name  string
		codes []uint
		// What becomes of a signature whose first C_Sign answers the code.
		hidden    bool // the caller gets a good signature all the same
		ofSession bool // the error matches ErrSession
		renewed   bool // the physical session is another one afterwards
	}{
		{name: "the caller's fault", codes: []uint{
			pkcs11.CKR_ARGUMENTS_BAD, pkcs11.CKR_DATA_LEN_RANGE, pkcs11.CKR_DATA_INVALID, pkcs11.CKR_MECHANISM_INVALID,
			pkcs11.CKR_MECHANISM_PARAM_INVALID, pkcs11.CKR_FUNCTION_NOT_SUPPORTED, pkcs11.CKR_BUFFER_TOO_SMALL,
			pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_TEMPLATE_INCOMPLETE, pkcs11.CKR_SESSION_READ_ONLY,
		}},
		{name: "the key's fault", codes: []uint{
			pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED, pkcs11.CKR_KEY_TYPE_INCONSISTENT, pkcs11.CKR_KEY_SIZE_RANGE,
		}},
		{name: "a stale handle", hidden: true, codes: []uint{
			pkcs11.CKR_KEY_HANDLE_INVALID, pkcs11.CKR_OBJECT_HANDLE_INVALID,
		}},
		{name: "a lost login", hidden: true, codes: []uint{pkcs11.CKR_USER_NOT_LOGGED_IN}},
		{name: "a broken session", hidden: true, renewed: true, codes: []uint{
			pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_OPERATION_ACTIVE, pkcs11.CKR_OPERATION_NOT_INITIALIZED,
			pkcs11.CKR_FUNCTION_CANCELED,
		}},
		{name: "a token that is gone", ofSession: true, renewed: true, codes: []uint{
			pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_TOKEN_NOT_PRESENT, pkcs11.CKR_TOKEN_NOT_RECOGNIZED, pkcs11.CKR_SLOT_ID_INVALID,
		}},
		{name: "an HSM that is down", ofSession: true, renewed: true, codes: []uint{
			pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_DEVICE_MEMORY, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_HOST_MEMORY,
		}},
	}
	h := newHSM(t)
	p := h.pool(t)
	pub := makeKey(t, p, "key")
	for _, c := range cases {
		for _, code := range c.codes {
			t.Run(c.name+": "+pkcs11.Error(code).Error(), func(t *testing.T) {
				s := acquire(t, p)
				defer s.Release()
				mustSign(t, s, pub, "key") // the handle is known now
				before := p.Stats()
				digest := sha256.Sum256([]byte("data"))
				h.fault.Fail("C_Sign", 1, code)
				sig, err := sign(context.Background(), s, "key", digest[:])
				switch {
				case c.hidden && (err != nil || !verifies(pub, digest[:], sig)):
					t.Errorf("the caller noticed: %v", err)
				case !c.hidden && !errors.Is(err, pkcs11.Error(code)):
					t.Errorf("got %v, want the code", err)
				case errors.Is(err, sessionpool.ErrSession) != c.ofSession:
					t.Errorf("got %v, want ErrSession: %v", err, c.ofSession)
				}
				mustSign(t, s, pub, "key")
				if lost := p.Stats().ClosedLost - before.ClosedLost; (lost > 0) != c.renewed {
					t.Errorf("%d sessions were closed as lost, want a renewed session: %v", lost, c.renewed)
				}
			})
		}
	}
}

func TestAFailureThatTheFunctionDoesWithoutCostsASessionOnlyIfThatDoesNotAnswer(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	pub := makeKey(t, p, "key")
	s := acquire(t, p)
	defer s.Release()
	mustSign(t, s, pub, "key")
	for _, code := range []uint{pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_OBJECT_HANDLE_INVALID} {
		for _, answers := range []bool{true, false} {
			before := p.Stats().ClosedLost
			if err := s.Do(context.Background(), func(m sessionpool.Module, sh pkcs11.SessionHandle) error {
				h.fault.Fail("C_GetAttributeValue", 1, code)
				if _, err := m.GetAttributeValue(sh, 1, nil); err == nil {
					t.Error("the fault did not come")
				}
				if !answers {
					h.fault.Fail("C_GetSessionInfo", 1, pkcs11.CKR_DEVICE_ERROR)
				}
				return nil
			}); err != nil {
				t.Errorf("%v: %v", pkcs11.Error(code), err)
			}
			mustSign(t, s, pub, "key")
			if lost := p.Stats().ClosedLost - before; (lost == 0) != answers {
				t.Errorf("%v: %d sessions were lost, the session answers: %v", pkcs11.Error(code), lost, answers)
			}
		}
	}
}

func TestASessionThatFailedDoesNotGoBackToTheCache(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	pub := makeKey(t, p, "key")
	s := acquire(t, p)
	h.fault.Fail("C_Sign", 1, pkcs11.CKR_DEVICE_ERROR)
	digest := sha256.Sum256(nil)
	if _, err := sign(context.Background(), s, "key", digest[:]); err == nil {
		t.Fatal("the fault did not come")
	}
	s.Release()
	h.events.wait(t, 1, closedBy(sessionpool.CloseLost))
	if n := p.Stats().Idle; n != 0 {
		t.Errorf("%d sessions are idle, want none", n)
	}
	s = acquire(t, p)
	defer s.Release()
	mustSign(t, s, pub, "key")
}

func TestRetrySignsThroughAnHSMThatFailsNowAndThen(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	pub := makeKey(t, p, "key")
	digest := sha256.Sum256([]byte("data"))
	for _, code := range []uint{pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_DEVICE_ERROR} {
		h.fault.Fail("C_Sign", 1, code)
		h.fault.Fail("C_Sign", 2, code)
		var sig []byte
		err := sessionpool.Retry(context.Background(), p, func(s *sessionpool.Session) (err error) {
			sig, err = sign(context.Background(), s, "key", digest[:])
			return err
		})
		if err != nil || !verifies(pub, digest[:], sig) {
			t.Errorf("after %v: %v", pkcs11.Error(code), err)
		}
	}
}

func TestADeadDeviceIsBroughtBackByInitialisingTheModuleAgain(t *testing.T) {
	h := newHSM(t)
	dead := func(m sessionpool.Module) sessionpool.Module {
		return &deadUntilRestart{Module: h.fault.Wrap(m), h: h}
	}
	p := h.pool(t, func(c *sessionpool.Config) { c.Wrap = dead })
	pub := makeKey(t, p, "key")
	s := acquire(t, p)
	mustSign(t, s, pub, "key")
	s.Release()
	h.fault.FailAll("C_Sign", pkcs11.CKR_DEVICE_ERROR) // until C_Initialize clears it
	digest := sha256.Sum256([]byte("data"))
	var sig []byte
	err := sessionpool.Retry(context.Background(), p, func(s *sessionpool.Session) (err error) {
		sig, err = sign(context.Background(), s, "key", digest[:])
		return err
	})
	if err != nil || !verifies(pub, digest[:], sig) {
		t.Errorf("the device did not come back: %v", err)
	}
	if n := h.fault.Calls("C_Initialize"); n != 2 {
		t.Errorf("C_Initialize was called %d times, want twice", n)
	}
}

// deadUntilRestart is a module whose device is dead until C_Initialize.
type deadUntilRestart struct {
	sessionpool.Module
	h *hsm
}

func (m *deadUntilRestart) Initialize(opts ...pkcs11.InitializeOption) error {
	m.h.fault.Clear()
	return m.Module.Initialize(opts...)
}

func TestATokenThatWasRemovedAndIsBackIsFoundAgain(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	pub := makeKey(t, p, "key")
	h.fault.FailAll("C_OpenSession", pkcs11.CKR_TOKEN_NOT_PRESENT)
	h.fault.FailAll("C_GetTokenInfo", pkcs11.CKR_TOKEN_NOT_PRESENT)
	h.fault.FailAll("C_Sign", pkcs11.CKR_DEVICE_REMOVED)
	err := sessionpool.Retry(context.Background(), p, func(s *sessionpool.Session) error {
		digest := sha256.Sum256(nil)
		_, err := sign(context.Background(), s, "key", digest[:])
		return err
	})
	if !errors.Is(err, sessionpool.ErrSession) {
		t.Errorf("without the token: %v, want ErrSession", err)
	}
	if errors.Is(err, sessionpool.ErrConfig) || errors.Is(err, sessionpool.ErrPIN) {
		t.Errorf("without the token: %v, which blames the wrong thing", err)
	}
	h.fault.Clear()
	s := acquire(t, p)
	defer s.Release()
	mustSign(t, s, pub, "key")
}

func TestAModuleThatSomebodyElseInitialisedIsAdopted(t *testing.T) {
	h := newHSM(t)
	other := pkcs11.New(h.Module)
	if err := other.Initialize(); err != nil {
		t.Fatal(err)
	}
	slots, err := other.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := other.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Login(theirs, pkcs11.CKU_USER, testhsm.PIN); err != nil {
		t.Fatal(err)
	}
	p, err := sessionpool.New(h.cfg)
	if err != nil {
		t.Fatal(err)
	}
	pub := makeKey(t, p, "key")
	s := acquire(t, p)
	mustSign(t, s, pub, "key")
	s.Release()
	if st := p.Stats(); !st.LoggedIn || st.PINVerified {
		t.Errorf("stats %+v, want logged in with a PIN that nobody verified", st)
	}
	closePool(t, p)
	if info, err := other.GetSessionInfo(theirs); err != nil || info.State != 1 {
		t.Errorf("their session has state %d (%v), want it logged in still", info.State, err)
	}
	if err := other.Finalize(); err != nil {
		t.Errorf("their C_Finalize: %v", err)
	}
}

func TestAModuleThatSomebodyElseUsesIsNotFinalised(t *testing.T) {
	h := newHSM(t)
	p, err := sessionpool.New(h.cfg)
	if err != nil {
		t.Fatal(err)
	}
	s := acquire(t, p)
	s.Release()
	other := pkcs11.New(h.Module)
	if err := other.Initialize(); !errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)) {
		t.Fatalf("their C_Initialize: %v", err)
	}
	slots, err := other.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := other.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Login(theirs, pkcs11.CKU_USER, testhsm.PIN); !errors.Is(err, pkcs11.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN)) {
		t.Fatalf("their C_Login: %v", err)
	}
	closePool(t, p)
	if _, err := other.GetSessionInfo(theirs); err != nil {
		t.Errorf("their session is gone: %v", err)
	}
	if err := other.Finalize(); err != nil {
		t.Errorf("their C_Finalize: %v", err)
	}
}
