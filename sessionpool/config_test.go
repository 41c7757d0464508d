package sessionpool_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

func goexit() { runtime.Goexit() }

func TestAConfigurationThatCannotWorkIsRefused(t *testing.T) {
	h := newHSM(t)
	text := filepath.Join(t.TempDir(), "text.so")
	if err := os.WriteFile(text, []byte("not a library"), 0o600); err != nil {
		t.Fatal(err)
	}
	slot := uint(999999)
	for name, change := range map[string]func(*sessionpool.Config){
		"no module":             func(c *sessionpool.Config) { c.Module = "" },
		"a module that is not":  func(c *sessionpool.Config) { c.Module = "/no/such/module.so" },
		"a bare name":           func(c *sessionpool.Config) { c.Module = "no-such-module.so" },
		"a directory":           func(c *sessionpool.Config) { c.Module = t.TempDir() },
		"a text file":           func(c *sessionpool.Config) { c.Module = text },
		"another library":       func(c *sessionpool.Config) { c.Module = "libc.so.6" },
		"no such token":         func(c *sessionpool.Config) { c.TokenLabel = "nobody" },
		"no such serial":        func(c *sessionpool.Config) { c.TokenSerial = "nobody" },
		"no such slot":          func(c *sessionpool.Config) { c.Slot = &slot },
		"negative sessions":     func(c *sessionpool.Config) { c.MaxSessions = -1 },
		"absurd sessions":       func(c *sessionpool.Config) { c.MaxSessions = 1 << 30 },
		"negative orphans":      func(c *sessionpool.Config) { c.MaxOrphans = -1 },
		"negative idle timeout": func(c *sessionpool.Config) { c.IdleTimeout = -1 },
		"absurd idle timeout":   func(c *sessionpool.Config) { c.IdleTimeout = 1 << 62 },
		"negative op timeout":   func(c *sessionpool.Config) { c.OpTimeout = -time.Second },
		"env of a shared one":   func(c *sessionpool.Config) { c.ModuleEnv = []string{"A=b"} },
		"env without a name":    func(c *sessionpool.Config) { c.Private, c.ModuleEnv = true, []string{"=b"} },
	} {
		cfg := h.cfg
		change(&cfg)
		if p, err := sessionpool.New(cfg); !errors.Is(err, sessionpool.ErrConfig) {
			t.Errorf("%s: got %v, want ErrConfig", name, err)
			if err == nil {
				closePool(t, p)
			}
		}
	}
	if n := h.fault.Calls("C_OpenSession") + h.fault.Calls("C_Login"); n != 0 {
		t.Errorf("%d calls reached the token", n)
	}
}

func TestSeveralTokensAreListedForTheOneWhoMustChoose(t *testing.T) {
	tok := testhsm.New(t, "first", "second")
	_, err := sessionpool.New(sessionpool.Config{Module: tok.Module})
	if !errors.Is(err, sessionpool.ErrConfig) || !strings.Contains(err.Error(), `"first"`) || !strings.Contains(err.Error(), `"second"`) {
		t.Errorf("got %v, want ErrConfig with both labels", err)
	}
	p, err := sessionpool.New(sessionpool.Config{Module: tok.Module, TokenLabel: "second   "})
	if err != nil {
		t.Fatal(err)
	}
	info := p.Token()
	closePool(t, p)
	p, err = sessionpool.New(sessionpool.Config{Module: tok.Module, TokenSerial: info.Serial, Slot: &info.Slot})
	if err != nil {
		t.Fatal(err)
	}
	if got := p.Token().Label; got != "second" {
		t.Errorf("by serial and slot: token %q, want second", got)
	}
	closePool(t, p)
}

func TestOneOddSlotDoesNotHideTheOthers(t *testing.T) {
	tok := testhsm.New(t, "good", "odd")
	for _, code := range []uint{pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_TOKEN_NOT_PRESENT, pkcs11.CKR_TOKEN_NOT_RECOGNIZED} {
		p, err := sessionpool.New(sessionpool.Config{
			Module: tok.Module, TokenLabel: "good", PIN: sessionpool.StaticPIN(testhsm.PIN),
			Wrap: func(m sessionpool.Module) sessionpool.Module { return &oddSlot{Module: m, code: code} },
		})
		if err != nil {
			t.Fatal(err)
		}
		s := acquire(t, p)
		s.Release()
		closePool(t, p)
	}
}

// oddSlot fails C_GetTokenInfo for the token called odd.
type oddSlot struct {
	sessionpool.Module
	code uint
}

func (m *oddSlot) GetTokenInfo(slot uint) (pkcs11.TokenInfo, error) {
	info, err := m.Module.GetTokenInfo(slot)
	if info.Label == "odd" {
		return pkcs11.TokenInfo{}, pkcs11.Error(m.code)
	}
	return info, err
}

func TestPrivateInstancesOfALibraryAreIndependent(t *testing.T) {
	h := newHSM(t)
	private := func(c *sessionpool.Config) { c.Private = true }
	a, b := h.pool(t, private), h.pool(t, private)
	s, u := acquire(t, a), acquire(t, b)
	if s.Token() == u.Token() {
		t.Error("two private instances share a token")
	}
	s.Release()
	closePool(t, a)
	if err := ping(u); err != nil {
		t.Errorf("closing one instance broke the other: %v", err)
	}
	u.Release()
	left, err := filepath.Glob(filepath.Join(os.TempDir(), "hsmkey-module-*"))
	if err != nil || len(left) != 0 {
		t.Errorf("copies of the library are left behind: %v %v", left, err)
	}
}

func TestAPrivateInstanceSeesItsOwnEnvironment(t *testing.T) {
	mine, other := testhsm.New(t, "mine"), testhsm.NewDetached(t, "other")
	before := os.Getenv("SOFTHSM2_CONF")
	p, err := sessionpool.New(sessionpool.Config{
		Module: mine.Module, TokenLabel: "other", Private: true, ModuleEnv: []string{"SOFTHSM2_CONF=" + other.Conf},
	})
	if err != nil {
		t.Fatal(err)
	}
	closePool(t, p)
	if after := os.Getenv("SOFTHSM2_CONF"); after != before {
		t.Errorf("the environment was left changed: %s", after)
	}
}

func TestEventsAreForLogs(t *testing.T) {
	h := newHSM(t)
	var out bytes.Buffer
	logger := slog.New(slog.NewJSONHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))
	p, err := sessionpool.New(sessionpool.Config{
		Module: h.Module, TokenLabel: h.Labels[0], PIN: sessionpool.StaticPIN(testhsm.PIN),
		OnEvent: sessionpool.LogEvents(logger), Wrap: h.fault.Wrap,
	})
	if err != nil {
		t.Fatal(err)
	}
	pub := makeKey(t, p, "key")
	s := acquire(t, p)
	h.fault.LoseLogin()
	mustSign(t, s, pub, "key")
	s.Close()
	if _, err := p.Acquire(context.Background(), sessionpool.OneTimePIN("wrong-otp")); err == nil {
		t.Error("a wrong one-time PIN was accepted")
	}
	closePool(t, p)
	if o, c := strings.Count(out.String(), "hsm session opened"), strings.Count(out.String(), "hsm session closed"); o != c {
		t.Errorf("the log tells of %d sessions that were opened, %d that were closed", o, c)
	}
	for _, want := range []string{
		`"msg":"hsm session opened"`, `"msg":"hsm logged in"`, `"level":"WARN","msg":"hsm login lost"`,
		`"msg":"hsm session closed","event":{"kind":"session closed","token":"token \"hsmkey-test\"`, `"cause":"asked"`,
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the log lacks %s", want)
		}
	}
	if strings.Contains(out.String(), testhsm.PIN) || strings.Contains(out.String(), "wrong-otp") {
		t.Error("the log shows a PIN")
	}
}
