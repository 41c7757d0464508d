package hsmkey_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

func TestWithSessionClosesOnEveryPath(t *testing.T) {
	test := testhsm.New(t)
	failure := errors.New("the caller's own")
	for _, want := range []error{nil, failure} {
		var kept *sessionpool.Session
		err := hsmkey.WithSession(context.Background(), config(test), func(s *sessionpool.Session) error {
			kept = s
			return want
		})
		if !errors.Is(err, want) {
			t.Errorf("WithSession = %v, want %v", err, want)
		}
		if err := kept.Do(context.Background(), nil); !errors.Is(err, hsmkey.ErrClosed) {
			t.Errorf("the session afterwards: %v, want ErrClosed", err)
		}
	}
	c := config(test)
	c.Pool.PIN = sessionpool.StaticPIN("")
	err := hsmkey.WithSession(context.Background(), c, func(*sessionpool.Session) error {
		t.Error("it was called without a session")
		return nil
	})
	if !errors.Is(err, hsmkey.ErrPIN) {
		t.Errorf("WithSession = %v, want ErrPIN", err)
	}
}

func TestOpenRefusesWhatCannotWork(t *testing.T) {
	test := testhsm.New(t)
	for name, change := range map[string]func(*hsmkey.Config){
		"no module":        func(c *hsmkey.Config) { c.Pool.Module = "" },
		"a missing module": func(c *hsmkey.Config) { c.Pool.Module = "/nowhere/module.so" },
		"no library":       func(c *hsmkey.Config) { c.Pool.Module = test.Conf },
		"no such token":    func(c *hsmkey.Config) { c.Pool.TokenLabel = "another" },
	} {
		c := config(test)
		change(&c)
		if h, err := hsmkey.Open(context.Background(), c); !errors.Is(err, hsmkey.ErrConfig) || h != nil {
			t.Errorf("%s: %v, want ErrConfig", name, err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := hsmkey.Open(ctx, config(test)); !errors.Is(err, context.Canceled) {
		t.Errorf("Open = %v, want context.Canceled", err)
	}
}

// p11-kit carries every call to another process, and knows fewer mechanisms than
// the module there.
func TestKeysSignThroughP11Kit(t *testing.T) {
	test := testhsm.NewDetached(t)
	testhsm.GenerateEd25519(t, test, "edwards", "01")
	server := testhsm.Serve(t, test)
	c := config(test)
	c.Pool.Module = server.Client()
	h := open(t, c)
	ctx := context.Background()
	for typ, private := range newKeys(t) {
		key, err := h.Import(ctx, string(typ), private, nil)
		if typ == hsmkey.Ed25519 {
			if !errors.Is(err, hsmkey.ErrUnsupported) || errors.Is(err, hsmkey.ErrSession) {
				t.Errorf("importing a key that p11-kit lets nobody use: %v, want ErrUnsupported", err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", typ, err)
			continue
		}
		for _, algorithm := range key.Algorithms() {
			signature, err := key.SignJWS(ctx, algorithm, []byte("a.b"))
			if err != nil {
				t.Errorf("%s: %v", algorithm, err)
			} else if err := verify(key, algorithm, []byte("a.b"), signature); err != nil {
				t.Errorf("%s: %v", algorithm, err)
			}
		}
	}
	signOnce(t, generate(t, h, "secret", hsmkey.HMAC256))
	for label, info := range listing(t, h) {
		if info.Err != nil {
			t.Errorf("%s: %v", label, info.Err)
		}
	}
	if n := len(listing(t, h)); n != 6 {
		t.Errorf("%d keys listed, want 6", n)
	}
	edwards, err := h.Key(ctx, hsmkey.Query{Label: "edwards"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := edwards.SignJWS(ctx, hsmkey.EdDSA, nil); !errors.Is(err, hsmkey.ErrUnsupported) ||
		!strings.Contains(err.Error(), "CKM_EDDSA") || !strings.Contains(err.Error(), testhsm.DefaultLabel) {
		t.Errorf("SignJWS = %v, want ErrUnsupported that names mechanism and token", err)
	}
}
