package sessionpool_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

func TestALibraryTellsOfItselfItsSlotsAndTokens(t *testing.T) {
	h := newHSM(t)
	testhsm.New(t, "good", "odd")
	h.cfg.Wrap = func(m sessionpool.Module) sessionpool.Module {
		return &oddSlot{Module: h.fault.Wrap(m), code: pkcs11.CKR_DEVICE_ERROR}
	}
	info, err := sessionpool.Inspect(context.Background(), h.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if info.Description == "" || info.Version == "0.0" || info.Cryptoki != "2.40" || info.Path == "" {
		t.Errorf("%+v", info)
	}
	var good, odd, blank int
	for _, s := range info.Slots {
		switch {
		case s.Err != nil:
			odd++
			if !errors.Is(s.Err, pkcs11.Error(pkcs11.CKR_DEVICE_ERROR)) {
				t.Errorf("slot %d: %v", s.Slot, s.Err)
			}
		case s.Token.Label == "good" && s.Token.Initialized():
			good++
		case !s.Token.Initialized():
			blank++
		}
	}
	if good != 1 || odd != 1 || blank != 1 {
		t.Errorf("%d good, %d odd, %d uninitialised slots, want one of each: %+v", good, odd, blank, info.Slots)
	}
	if n := h.fault.Calls("C_Finalize"); n != 1 {
		t.Errorf("the library was finalised %d times, want once", n)
	}
	if n := h.fault.Calls("C_Login"); n != 0 {
		t.Errorf("%d logins", n)
	}
}

func TestInspectingALibraryInUseDisturbsNobody(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	s := acquire(t, p)
	defer s.Release()
	info, err := sessionpool.Inspect(context.Background(), h.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(info.Slots, func(s sessionpool.SlotInfo) bool { return s.Token.Label == h.Labels[0] }) {
		t.Errorf("%+v", info.Slots)
	}
	if err := ping(s); err != nil {
		t.Error(err)
	}
}

func TestInspectingALibraryThatHangsEndsInTime(t *testing.T) {
	h := newHSM(t)
	h.cfg.OpTimeout = 50 * time.Millisecond
	_, release := h.fault.Hang("C_GetSlotList")
	if _, err := sessionpool.Inspect(context.Background(), h.cfg); !errors.Is(err, sessionpool.ErrTimeout) {
		t.Errorf("Inspect = %v, want ErrTimeout", err)
	}
	release()
	h.cfg.OpTimeout = 0
	closePool(t, h.pool(t)) // finalises the library
}

func TestALibraryThatIsNoneCannotBeInspected(t *testing.T) {
	if _, err := sessionpool.Inspect(context.Background(), sessionpool.Config{Module: "/missing.so"}); !errors.Is(err, sessionpool.ErrConfig) {
		t.Errorf("Inspect = %v, want ErrConfig", err)
	}
	h := newHSM(t)
	h.fault.Fail("C_Initialize", 1, pkcs11.CKR_GENERAL_ERROR)
	if _, err := sessionpool.Inspect(context.Background(), h.cfg); !errors.Is(err, sessionpool.ErrSession) {
		t.Errorf("Inspect = %v, want ErrSession", err)
	}
}

func TestAPublicSessionNeedsNoPIN(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.PIN = sessionpool.StaticPIN("wrong"); c.MaxSessions = 1 })
	s := acquire(t, p, sessionpool.Public())
	if err := ping(s); err != nil {
		t.Error(err)
	}
	s.Release()
	if n := h.fault.Calls("C_Login"); n != 0 {
		t.Errorf("%d logins for a public session", n)
	}
	if _, err := p.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrPIN) {
		t.Errorf("a session of the user: %v, want ErrPIN", err)
	}
	// Both kinds side by side, where there is room for one.
	p.SetPIN(testhsm.PIN)
	acquire(t, p).Release()
	acquire(t, p, sessionpool.Public()).Release()
	s = acquire(t, p)
	defer s.Release()
	if got := s.Token().Stats(); !got.PINVerified || got.Limit != 1 {
		t.Errorf("%+v", got)
	}
}
