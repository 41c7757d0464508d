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
