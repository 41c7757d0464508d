package hsmkey_test

import (
	"context"
	"crypto"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/fault"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// always makes every new private key one that wants the PIN at each use.
type always struct{ odd }

func (o always) GenerateKeyPair(h pkcs11.SessionHandle, m []*pkcs11.Mechanism, public, private []*pkcs11.Attribute) (pkcs11.ObjectHandle, pkcs11.ObjectHandle, error) {
	return o.Module.GenerateKeyPair(h, m, public, append(private, pkcs11.NewAttribute(pkcs11.CKA_ALWAYS_AUTHENTICATE, true)))
}

// authenticates opens a token whose keys want the PIN at each use. SoftHSM2
// enforces it: a signature without the login is refused.
func authenticates(tb testing.TB) (*hsmkey.HSM, *fault.Injector) {
	tb.Helper()
	injector := fault.New()
	return wrapped(tb, func(m sessionpool.Module) sessionpool.Module { return always{odd{injector.Wrap(m)}} }), injector
}

func TestAKeyThatWantsThePINAtEachUseGetsIt(t *testing.T) {
	h, injector := authenticates(t)
	for _, typ := range []hsmkey.KeyType{hsmkey.RSA2048, hsmkey.P256, hsmkey.Ed25519} {
		generate(t, h, string(typ), typ)
		key := mustFind(t, h, hsmkey.Query{Label: string(typ)})
		before := injector.Calls("C_Login")
		for _, algorithm := range key.Algorithms() {
			signature, err := key.SignJWS(context.Background(), algorithm, []byte("a.b"))
			if err != nil {
				t.Fatal(err)
			}
			if err := verify(key, algorithm, []byte("a.b"), signature); err != nil {
				t.Errorf("%s: %v", algorithm, err)
			}
		}
		if n := injector.Calls("C_Login") - before; n != len(key.Algorithms()) {
			t.Errorf("%s: %d logins for %d signatures", typ, n, len(key.Algorithms()))
		}
		if typ != hsmkey.Ed25519 {
			if _, err := key.Sign(nil, make([]byte, 32), crypto.SHA256); err != nil {
				t.Errorf("%s: Sign: %v", typ, err)
			}
		}
	}
}

func TestKeysThatWantThePINSignFromManyGoroutines(t *testing.T) {
	h, _ := authenticates(t)
	key := generate(t, h, "key", hsmkey.P256)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 10 {
				signature, err := key.SignJWS(context.Background(), hsmkey.ES256, []byte("a.b"))
				if err != nil {
					t.Error(err)
				} else if err := verify(key, hsmkey.ES256, []byte("a.b"), signature); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// refusesPIN fails the test unless signing fails for the PIN's sake.
func refusesPIN(t *testing.T, key *hsmkey.HSMJWK) {
	t.Helper()
	_, err := key.SignJWS(context.Background(), hsmkey.ES256, []byte("a.b"))
	if !errors.Is(err, hsmkey.ErrPIN) || errors.Is(err, hsmkey.ErrSession) {
		t.Errorf("SignJWS = %v, want ErrPIN", err)
	}
}

// setPIN is a person who says what the PIN is.
func setPIN(t *testing.T, h *hsmkey.HSM, pin string) {
	t.Helper()
	pool, ok := h.Source().(*sessionpool.Pool)
	if !ok {
		t.Fatalf("the source is a %T", h.Source())
	}
	pool.SetPIN(pin)
}

func TestAPINThatIsRejectedBeforeASignatureIsNotSentAgain(t *testing.T) {
	h, injector := authenticates(t)
	key := generate(t, h, "key", hsmkey.P256)
	signOnce(t, key)
	before, begun := injector.Calls("C_Login"), injector.Calls("C_SignInit")
	injector.Fail("C_Login", 1, pkcs11.CKR_PIN_INCORRECT)
	for range 5 {
		_, err := key.SignJWS(context.Background(), hsmkey.ES256, []byte("a.b"))
		if !errors.Is(err, hsmkey.ErrPIN) || !errors.Is(err, pkcs11.Error(pkcs11.CKR_PIN_INCORRECT)) {
			t.Errorf("SignJWS = %v, want ErrPIN with the token's code", err)
		}
	}
	if n := injector.Calls("C_SignInit") - begun; n != 1 {
		t.Errorf("%d signatures were begun, want 1: the PIN was known to be wrong", n)
	}
	injector.LoseLogin()
	if _, err := h.Key(context.Background(), hsmkey.Query{Label: "key"}); !errors.Is(err, hsmkey.ErrPIN) {
		t.Errorf("Key = %v, want ErrPIN: a login sends it no more than a signature does", err)
	}
	if n := injector.Calls("C_Login") - before; n != 1 {
		t.Errorf("%d logins, want 1", n)
	}
	setPIN(t, h, testhsm.PIN)
	signOnce(t, key) // the operation that was left open harms nobody
}

// changes has another PIN from some moment on. SoftHSM2 does not notice in one
// process what another one changes.
type changes struct {
	odd
	pin *atomic.Pointer[string]
}

func (o changes) Login(h pkcs11.SessionHandle, userType uint, pin string) error {
	if now := o.pin.Load(); now != nil {
		if pin != *now {
			return pkcs11.Error(pkcs11.CKR_PIN_INCORRECT)
		}
		pin = testhsm.PIN
	}
	return o.Module.Login(h, userType, pin)
}

func TestAPINThatChangesUnderTheProcessIsSentOnceBeforeSignatures(t *testing.T) {
	injector := fault.New()
	var pin atomic.Pointer[string]
	h := wrapped(t, func(m sessionpool.Module) sessionpool.Module {
		return always{odd{injector.Wrap(changes{odd{m}, &pin})}}
	})
	key := generate(t, h, "key", hsmkey.P256)
	signOnce(t, key)
	changed := "pin-2d90ee17"
	pin.Store(&changed)
	before := injector.Calls("C_Login")
	for range 5 {
		refusesPIN(t, key)
	}
	if n := injector.Calls("C_Login") - before; n != 1 {
		t.Errorf("%d logins with the old PIN, want 1", n)
	}
	setPIN(t, h, changed)
	for range 3 {
		signOnce(t, key)
	}
}

func TestAPINThatManySignaturesWantAtOnceIsRejectedOnce(t *testing.T) {
	h, injector := authenticates(t)
	key := generate(t, h, "key", hsmkey.P256)
	signOnce(t, key)
	const signers = 8
	begun, logins := injector.Calls("C_SignInit"), injector.Calls("C_Login")
	injector.Fail("C_Login", 1, pkcs11.CKR_PIN_INCORRECT)
	reached, release := injector.Hang("C_Login")
	var wg sync.WaitGroup
	for range signers {
		wg.Go(func() { refusesPIN(t, key) })
	}
	<-reached
	for injector.Calls("C_SignInit") < begun+signers {
		runtime.Gosched()
	}
	release()
	wg.Wait()
	if n := injector.Calls("C_Login") - logins; n != 1 {
		t.Errorf("%d logins, want 1", n)
	}
}

// flagged is a token that reports more flags than it has.
type flagged struct {
	odd
	flags *atomic.Uint32
}

func (o flagged) GetTokenInfo(slot uint) (pkcs11.TokenInfo, error) {
	info, err := o.Module.GetTokenInfo(slot)
	info.Flags |= uint(o.flags.Load())
	return info, err
}

func TestATokenThatIsLockedOrAtItsFinalTryGetsNoPINBeforeASignature(t *testing.T) {
	injector := fault.New()
	var flags atomic.Uint32
	h := wrapped(t, func(m sessionpool.Module) sessionpool.Module {
		return flagged{odd{always{odd{injector.Wrap(m)}}}, &flags}
	})
	key := generate(t, h, "key", hsmkey.P256)
	signOnce(t, key)
	before := injector.Calls("C_Login")
	for _, flag := range []uint32{pkcs11.CKF_USER_PIN_LOCKED, pkcs11.CKF_USER_PIN_FINAL_TRY} {
		flags.Store(flag)
		refusesPIN(t, key)
	}
	if n := injector.Calls("C_Login") - before; n != 0 {
		t.Errorf("%d logins, want none", n)
	}
	flags.Store(0)
	signOnce(t, key)
}

func TestALoginBeforeASignatureThatTheTokenDidNotJudgeIsMadeAgain(t *testing.T) {
	h, injector := authenticates(t)
	key := generate(t, h, "key", hsmkey.P256)
	for _, code := range []uint{pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_USER_NOT_LOGGED_IN, pkcs11.CKR_SESSION_CLOSED} {
		injector.Fail("C_Login", 1, code)
		signOnce(t, key)
	}
}

func TestALoginBeforeASignatureThatHangsDoesNotStopTheOthers(t *testing.T) {
	c := config(testhsm.New(t))
	injector := fault.New()
	c.Pool.Wrap = func(m sessionpool.Module) sessionpool.Module { return always{odd{injector.Wrap(m)}} }
	c.Pool.OpTimeout = 500 * time.Millisecond
	h := open(t, c)
	key := generate(t, h, "key", hsmkey.P256)
	_, release := injector.Hang("C_Login")
	defer release()
	signOnce(t, key) // on another session, while that login still hangs
	signOnce(t, key)
}

func TestAKeyFoundWithoutItsFlagIsAskedForThePINWhenItTurnsOut(t *testing.T) {
	test := testhsm.New(t)
	c := config(test)
	c.Pool.Wrap = func(m sessionpool.Module) sessionpool.Module { return always{odd{m}} }
	h := open(t, c)
	generate(t, h, "key", hsmkey.P256)
	if err := h.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	// The first read of the flag says no, as on another token of a fleet.
	first := true
	c.Pool.Wrap = func(m sessionpool.Module) sessionpool.Module {
		return answers{odd{m}, pkcs11.CKA_ALWAYS_AUTHENTICATE, func(value []byte) ([]byte, error) {
			if first {
				first = false
				return []byte{0}, nil
			}
			return value, nil
		}}
	}
	c.Pool.DisableCache = true // each session finds the key for itself
	key, err := open(t, c).Key(context.Background(), hsmkey.Query{Label: "key"})
	if err != nil {
		t.Fatal(err)
	}
	signOnce(t, key)
	signOnce(t, key)
}
