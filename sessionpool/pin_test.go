package sessionpool_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/internal/fault"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

const wrongPIN = "wrong-pin-71aa"

// spied is a configuration whose C_Login calls are counted from outside.
func spied(t *testing.T, pin sessionpool.PINSource) (sessionpool.Config, func(string) int) {
	tok := testhsm.New(t)
	module, calls := testhsm.Spy(t, tok)
	return sessionpool.Config{Module: module, TokenLabel: tok.Labels[0], PIN: pin}, calls
}

func TestAWrongPINIsOneAttemptForManyCallersAndPools(t *testing.T) {
	cfg, calls := spied(t, sessionpool.StaticPIN(wrongPIN))
	pools := make([]*sessionpool.Pool, 2)
	for i := range pools {
		p, err := sessionpool.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		pools[i] = p
	}
	var group sync.WaitGroup
	for i := range 64 {
		group.Go(func() {
			_, err := pools[i%2].Acquire(context.Background())
			if !errors.Is(err, sessionpool.ErrPIN) {
				t.Errorf("got %v, want ErrPIN", err)
			}
			if strings.Contains(err.Error(), wrongPIN) {
				t.Errorf("the error shows the PIN: %v", err)
			}
		})
	}
	group.Wait()
	for _, p := range pools {
		closePool(t, p)
	}
	// A process that tries again is no reason to send it again.
	p, err := sessionpool.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrPIN) {
		t.Errorf("got %v, want ErrPIN", err)
	}
	closePool(t, p)
	if n := calls("C_Login"); n != 1 {
		t.Errorf("C_Login was called %d times, want once", n)
	}
	if o, c := calls("C_OpenSession"), calls("C_CloseSession"); o != c {
		t.Errorf("%d sessions were opened, %d closed: a failed login left one open", o, c)
	}
}

func TestARecoveringPoolSendsAPINThatBecameWrongOnce(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	pub := makeKey(t, p, "key")
	s := acquire(t, p)
	mustSign(t, s, pub, "key")
	h.fault.LoseLogin()
	h.fault.FailAll("C_Login", pkcs11.CKR_PIN_INCORRECT)
	before := h.fault.Calls("C_Login")
	for range 5 {
		err := s.Do(context.Background(), func(m sessionpool.Module, sh pkcs11.SessionHandle) error {
			_, err := findKey(m, sh, "key")
			return err
		})
		if err == nil {
			t.Error("a private key was found without a login")
		}
		if _, err := p.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrPIN) && err != nil {
			t.Errorf("got %v, want ErrPIN", err)
		}
	}
	s.Release()
	if n := h.fault.Calls("C_Login") - before; n != 1 {
		t.Errorf("C_Login was called %d times, want once", n)
	}
}

func TestANewPINLiftsTheBlock(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.PIN = sessionpool.StaticPIN(wrongPIN) })
	if _, err := p.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrPIN) {
		t.Fatalf("got %v, want ErrPIN", err)
	}
	p.SetPIN(testhsm.PIN)
	s := acquire(t, p)
	s.Release()
}

func TestAPINFileThatWasCorrectedLiftsTheBlock(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pin")
	write := func(pin string) {
		if err := os.WriteFile(file, []byte(pin+"\r\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(wrongPIN)
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.PIN = sessionpool.PINFile(file) })
	for range 2 {
		if _, err := p.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrPIN) {
			t.Fatalf("got %v, want ErrPIN", err)
		}
	}
	if n := h.fault.Calls("C_Login"); n != 1 {
		t.Errorf("C_Login was called %d times, want once", n)
	}
	write(testhsm.PIN)
	s := acquire(t, p)
	s.Release()
}

func TestAPINThatCannotBeHadIsNotSent(t *testing.T) {
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty")
	large := filepath.Join(dir, "large")
	for name, size := range map[string]int{empty: 0, large: 5000} {
		if err := os.WriteFile(name, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	h := newHSM(t)
	for name, source := range map[string]sessionpool.PINSource{
		"missing file": sessionpool.PINFile(filepath.Join(dir, "missing")),
		"a directory":  sessionpool.PINFile(dir),
		"empty file":   sessionpool.PINFile(empty),
		"large file":   sessionpool.PINFile(large),
		"empty PIN":    sessionpool.StaticPIN(""),
		"failing source": func(context.Context) (string, error) {
			return testhsm.PIN, errors.New("the vault is sealed")
		},
	} {
		p := h.pool(t, func(c *sessionpool.Config) { c.PIN = source })
		if _, err := p.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrPIN) {
			t.Errorf("%s: got %v, want ErrPIN", name, err)
		}
	}
	if n := h.fault.Calls("C_Login"); n != 0 {
		t.Errorf("C_Login was called %d times, want never", n)
	}
}

func TestAnEmptyPINIsNotSentBeforeASignatureEither(t *testing.T) {
	h := newHSM(t)
	s := acquire(t, h.pool(t))
	defer s.Release()
	before := h.fault.Calls("C_Login")
	err := s.Do(context.Background(), func(m sessionpool.Module, sh pkcs11.SessionHandle) error {
		return m.Login(sh, pkcs11.CKU_CONTEXT_SPECIFIC, "")
	})
	if !errors.Is(err, sessionpool.ErrPIN) {
		t.Errorf("got %v, want ErrPIN", err)
	}
	if n := h.fault.Calls("C_Login") - before; n != 0 {
		t.Errorf("C_Login was called %d times, want never", n)
	}
}

func TestASecondPoolWithAnotherPINIsRefusedWithoutALogin(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	s := acquire(t, p)
	defer s.Release()
	other := h.pool(t, func(c *sessionpool.Config) { c.PIN = sessionpool.StaticPIN(wrongPIN) })
	if _, err := other.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrPIN) {
		t.Errorf("got %v, want ErrPIN", err)
	}
	if n := h.fault.Calls("C_Login"); n != 1 {
		t.Errorf("C_Login was called %d times, want once", n)
	}
}

// flags is a token that reports more flags than it has.
type flags struct {
	sessionpool.Module
	set, clear uint
}

func (m *flags) GetTokenInfo(slot uint) (pkcs11.TokenInfo, error) {
	info, err := m.Module.GetTokenInfo(slot)
	info.Flags = info.Flags&^m.clear | m.set
	return info, err
}

func TestATokenThatIsLockedOrAtItsFinalTryGetsNoPIN(t *testing.T) {
	for name, flag := range map[string]uint{"locked": pkcs11.CKF_USER_PIN_LOCKED, "final try": pkcs11.CKF_USER_PIN_FINAL_TRY} {
		t.Run(name, func(t *testing.T) {
			h := newHSM(t)
			p := h.pool(t, func(c *sessionpool.Config) {
				c.Wrap = func(m sessionpool.Module) sessionpool.Module { return &flags{Module: h.fault.Wrap(m), set: flag} }
			})
			if _, err := p.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrPIN) {
				t.Errorf("got %v, want ErrPIN", err)
			}
			if n := h.fault.Calls("C_Login"); n != 0 {
				t.Errorf("C_Login was called %d times, want never", n)
			}
			if n := h.fault.Sessions(); n > 1 {
				t.Errorf("%d sessions are open", n)
			}
		})
	}
}

func TestATokenWithoutUserPINSaysSo(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) {
		c.Wrap = func(m sessionpool.Module) sessionpool.Module {
			return &flags{Module: h.fault.Wrap(m), clear: pkcs11.CKF_USER_PIN_INITIALIZED}
		}
	})
	if _, err := p.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrPIN) || !strings.Contains(err.Error(), "no user PIN") {
		t.Errorf("got %v, want ErrPIN that says there is no user PIN", err)
	}
}

func TestATokenThatKnowsNoLoginIsUsedWithoutOne(t *testing.T) {
	t.Run("by its flags", func(t *testing.T) {
		h := newHSM(t)
		p := h.pool(t, func(c *sessionpool.Config) {
			c.Wrap = func(m sessionpool.Module) sessionpool.Module {
				return &flags{Module: h.fault.Wrap(m), clear: pkcs11.CKF_LOGIN_REQUIRED}
			}
		})
		s := acquire(t, p)
		s.Release()
		if n := h.fault.Calls("C_Login"); n != 0 {
			t.Errorf("C_Login was called %d times, want never", n)
		}
	})
	t.Run("by its answer", func(t *testing.T) {
		h := newHSM(t)
		h.fault.FailAll("C_Login", pkcs11.CKR_FUNCTION_NOT_SUPPORTED)
		p := h.pool(t)
		s := acquire(t, p)
		s.Release()
	})
}

func TestALoginThatTheTokenDidNotJudgeDoesNotBlockThePIN(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	h.fault.Fail("C_Login", 1, pkcs11.CKR_DEVICE_ERROR)
	if _, err := p.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrSession) {
		t.Errorf("got %v, want ErrSession", err)
	}
	s := acquire(t, p)
	s.Release()
}

func TestAPersonMayTakeLongToTypeThePIN(t *testing.T) {
	h := newHSM(t)
	asked, typed := make(chan struct{}), make(chan struct{})
	p := h.pool(t, func(c *sessionpool.Config) {
		c.OpTimeout = 200 * time.Millisecond
		c.PIN = func(context.Context) (string, error) {
			close(asked)
			<-typed
			return testhsm.PIN, nil
		}
	})
	go func() {
		<-asked
		time.AfterFunc(400*time.Millisecond, func() { close(typed) })
	}()
	s := acquire(t, p)
	s.Release()
}

func TestASecondPoolWithAnotherPINGetsNoCachedSession(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	acquire(t, p).Release()
	other := h.pool(t, func(c *sessionpool.Config) { c.PIN = sessionpool.StaticPIN(wrongPIN) })
	if s, err := other.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrPIN) {
		t.Errorf("got %v, want ErrPIN", err)
		if err == nil {
			s.Release()
		}
	}
	if st := p.Stats(); st.Idle != 1 || st.InUse != 0 {
		t.Errorf("stats %+v, want the session back in the cache", st)
	}
	// The same PIN is good for the cached session.
	same := h.pool(t)
	acquire(t, same).Release()
	if st := p.Stats(); st.Reused != 1 || st.Logins != 1 {
		t.Errorf("stats %+v, want the session reused without another login", st)
	}
}

// A PIN is read when a login is due, not when there is only reason to look
// whether the login still holds.
func TestAPINThatChangedDoesNotDisturbALoginThatHolds(t *testing.T) {
	for name, source := range map[string]sessionpool.PINSource{
		"another PIN":  sessionpool.StaticPIN("tomorrows-pin"),
		"no PIN":       sessionpool.StaticPIN(""),
		"no more file": sessionpool.PINFile("/no/such/file"),
	} {
		for _, one := range []bool{false, true} {
			h := newHSM(t)
			now := sessionpool.StaticPIN(testhsm.PIN)
			p := h.pool(t, func(c *sessionpool.Config) {
				c.PIN = func(ctx context.Context) (string, error) { return now(ctx) }
				if one {
					c.Wrap = func(m sessionpool.Module) sessionpool.Module { return h.fault.Wrap(&oneSession{Module: m}) }
				}
			})
			pub := makeKey(t, p, "key")
			s := acquire(t, p)
			mustSign(t, s, pub, "key")
			now = source
			before := h.fault.Calls("C_Login")
			// It may have been lost, but was not.
			h.fault.Fail("C_Sign", 1, pkcs11.CKR_USER_NOT_LOGGED_IN)
			mustSign(t, s, pub, "key")
			s.Release()
			if n := h.fault.Calls("C_Login") - before; n != 0 {
				t.Errorf("%s: C_Login was called %d times, want never", name, n)
			}
			closePool(t, p)
		}
	}
}

func TestALoginThatHangsDoesNotHoldThoseOfOtherTokensForEver(t *testing.T) {
	tok := testhsm.New(t, "a", "b")
	inject := fault.New()
	cfg := sessionpool.Config{
		Module: tok.Module, PIN: sessionpool.StaticPIN(testhsm.PIN), PINGuard: &sessionpool.PINGuard{},
		Wrap: inject.Wrap, OpTimeout: 300 * time.Millisecond,
	}
	pool := func(label string) *sessionpool.Pool {
		cfg.TokenLabel = label
		p, err := sessionpool.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { closePool(t, p) })
		return p
	}
	a, b := pool("a"), pool("b")
	s := acquire(t, b)
	defer s.Release()
	// From now on nobody knows the PIN that both have.
	a.SetPIN("new-pin")
	b.SetPIN("new-pin")
	inject.LoseLogin()
	_, release := inject.Hang("C_Login")
	defer release()
	if _, err := a.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrTimeout) {
		t.Errorf("a login that hangs: %v, want ErrTimeout", err)
	}
	if err := s.Do(context.Background(), func(m sessionpool.Module, h pkcs11.SessionHandle) error {
		return m.FindObjectsInit(h, nil)
	}); !errors.Is(err, sessionpool.ErrTimeout) {
		t.Errorf("a login that waits for it: %v, want ErrTimeout", err)
	}
	if n := inject.Calls("C_Login"); n != 2 {
		t.Errorf("C_Login was called %d times, want twice: the PIN is being tried", n)
	}
	release()
	until(t, "the orphan is back", func() bool { return a.Stats().Orphans == 0 })
}

func TestATokenThatIsLockedSaysNothingAboutThePINOfOthers(t *testing.T) {
	for _, code := range []uint{pkcs11.CKR_PIN_LOCKED, pkcs11.CKR_PIN_EXPIRED} {
		t.Run(pkcs11.Error(code).Error(), func(t *testing.T) {
			tok := testhsm.New(t, "a", "b")
			inject := fault.New()
			guard := &sessionpool.PINGuard{}
			pool := func(label string) *sessionpool.Pool {
				p, err := sessionpool.New(sessionpool.Config{
					Module: tok.Module, TokenLabel: label, PIN: sessionpool.StaticPIN(testhsm.PIN), PINGuard: guard, Wrap: inject.Wrap,
				})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { closePool(t, p) })
				return p
			}
			locked, sound := pool("a"), pool("b")
			inject.Fail("C_Login", 1, code)
			if _, err := locked.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrPIN) {
				t.Errorf("got %v, want ErrPIN", err)
			}
			acquire(t, sound).Release()
		})
	}
}

func TestAPINSourceThatPanicsLeavesNothingBehind(t *testing.T) {
	h := newHSM(t)
	secret := "in-the-panic-55"
	source := func(context.Context) (string, error) { panic(secret) }
	p := h.pool(t, func(c *sessionpool.Config) {
		c.PIN = func(ctx context.Context) (string, error) { return source(ctx) }
	})
	_, err := p.Acquire(context.Background())
	if !errors.Is(err, sessionpool.ErrPIN) || strings.Contains(err.Error(), secret) {
		t.Errorf("got %v, want ErrPIN without what was panicked with", err)
	}
	source = func(context.Context) (string, error) { return testhsm.PIN, nil }
	acquire(t, p).Release()
}
