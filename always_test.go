package hsmkey_test

import (
	"context"
	"crypto"
	"errors"
	"sync"
	"testing"

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

func TestALoginBeforeASignatureThatFailsIsNotRepeated(t *testing.T) {
	h, injector := authenticates(t)
	key := generate(t, h, "key", hsmkey.P256)
	signOnce(t, key)
	before := injector.Calls("C_Login")
	injector.Fail("C_Login", 1, pkcs11.CKR_PIN_INCORRECT)
	_, err := key.SignJWS(context.Background(), hsmkey.ES256, []byte("a.b"))
	if !errors.Is(err, hsmkey.ErrPIN) || !errors.Is(err, pkcs11.Error(pkcs11.CKR_PIN_INCORRECT)) {
		t.Errorf("SignJWS = %v, want ErrPIN", err)
	}
	if n := injector.Calls("C_Login") - before; n != 1 {
		t.Errorf("%d logins, want 1", n)
	}
	signOnce(t, key) // the operation that was left open harms nobody
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
