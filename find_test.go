package hsmkey_test

import (
	"bytes"
	"context"
	"errors"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/fault"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// wrapped opens a fresh token behind a decorator.
func wrapped(tb testing.TB, wrap func(sessionpool.Module) sessionpool.Module) *hsmkey.HSM {
	tb.Helper()
	c := config(testhsm.New(tb))
	c.Pool.Wrap = wrap
	return open(tb, c)
}

// mustFind looks a key up and signs with it once.
func mustFind(tb testing.TB, h *hsmkey.HSM, query hsmkey.Query) *hsmkey.HSMJWK {
	tb.Helper()
	key, err := h.Key(context.Background(), query)
	if err != nil {
		tb.Fatal(err)
	}
	signOnce(tb, key)
	return key
}

// signOnce signs by the default algorithm and verifies.
func signOnce(tb testing.TB, key *hsmkey.HSMJWK) {
	tb.Helper()
	algorithm := key.Algorithms()[0]
	signature, err := key.SignJWS(context.Background(), algorithm, []byte("header.payload"))
	if err != nil {
		tb.Fatal(err)
	}
	if err := verify(key, algorithm, []byte("header.payload"), signature); err != nil {
		tb.Fatal(err)
	}
}

func TestAKeyIsFoundByLabelByIDAndByBoth(t *testing.T) {
	h := newHSM(t)
	generate(t, h, "other", hsmkey.P256)
	made, err := h.Generate(context.Background(), "wanted", hsmkey.P256, []byte{1, 2, 3})
	if err != nil {
		t.Fatal(err)
	}
	for _, query := range []hsmkey.Query{
		{Label: "wanted"}, {ID: []byte{1, 2, 3}}, {Label: "wanted", ID: []byte{1, 2, 3}}, {Label: "wanted  "},
	} {
		found := mustFind(t, h, query)
		if found.Label() != "wanted" || !bytes.Equal(found.ID(), []byte{1, 2, 3}) {
			t.Errorf("%s found %q %x", query, found.Label(), found.ID())
		}
		if !samePublic(found.Public(), made.Public()) {
			t.Errorf("%s found another public key", query)
		}
	}
	for _, query := range []hsmkey.Query{
		{Label: "want"}, {Label: "WANTED"}, {ID: []byte{1, 2}}, {Label: "other", ID: []byte{1, 2, 3}},
	} {
		_, err := h.Key(context.Background(), query)
		if !errors.Is(err, hsmkey.ErrKeyNotFound) {
			t.Errorf("%s: %v, want ErrKeyNotFound", query, err)
		} else if !strings.Contains(err.Error(), query.String()) || !strings.Contains(err.Error(), testhsm.DefaultLabel) {
			t.Errorf("the error names neither query nor token: %v", err)
		}
	}
}

func TestAQueryWithoutLabelAndIDIsRefused(t *testing.T) {
	h := newHSM(t)
	generate(t, h, "only", hsmkey.P256)
	for _, query := range []hsmkey.Query{{}, {Label: "   "}, {ID: []byte{}}} {
		if _, err := h.Key(context.Background(), query); !errors.Is(err, hsmkey.ErrInvalid) {
			t.Errorf("Key(%q) = %v, want ErrInvalid", query, err)
		}
		if err := h.Delete(context.Background(), query); !errors.Is(err, hsmkey.ErrInvalid) {
			t.Errorf("Delete(%q) = %v, want ErrInvalid", query, err)
		}
	}
}

func TestTwoKeysWithOneLabelAreAmbiguous(t *testing.T) {
	test := testhsm.New(t)
	testhsm.GenerateEC(t, test, "twin", "0102")
	testhsm.GenerateEC(t, test, "twin", "0a0b")
	h := open(t, config(test))
	_, err := h.Key(context.Background(), hsmkey.Query{Label: "twin"})
	if !errors.Is(err, hsmkey.ErrAmbiguous) {
		t.Fatalf("Key = %v, want ErrAmbiguous", err)
	}
	if err := h.Delete(context.Background(), hsmkey.Query{Label: "twin"}); !errors.Is(err, hsmkey.ErrAmbiguous) {
		t.Errorf("Delete = %v, want ErrAmbiguous", err)
	}
	mustFind(t, h, hsmkey.Query{Label: "twin", ID: []byte{0x0a, 0x0b}})
	mustFind(t, h, hsmkey.Query{ID: []byte{0x0a, 0x0b}})
}

// What cannot be read may be the key that was meant, so a label is not enough to
// choose another one. A query that the token itself does not find it by is.
func TestAKeyWithTheSameLabelThatCannotBeReadMakesTheLabelAmbiguous(t *testing.T) {
	for _, code := range unreadables {
		t.Run(pkcs11.Error(code).Error(), func(t *testing.T) {
			ctx := context.Background()
			test := testhsm.New(t)
			testhsm.GenerateEC(t, test, "twin", "01")
			testhsm.GenerateEC(t, test, "twin", "02")
			testhsm.PKCS11Tool(t, test, "--keypairgen", "--key-type", "EC:prime256v1", "--label", "padded   ", "--id", "03")
			var on atomic.Bool
			c := config(test)
			c.Pool.Wrap = func(m sessionpool.Module) sessionpool.Module {
				return while{odd{m}, &on, unreadable{odd{m}, pkcs11.CKO_PRIVATE_KEY, pkcs11.CKA_ID, "\x02", code}}
			}
			c.Pool.DisableCache = true // each session finds the key for itself
			h := open(t, c)
			byBoth := mustFind(t, h, hsmkey.Query{Label: "twin", ID: []byte{1}})
			on.Store(true)
			_, err := h.Key(ctx, hsmkey.Query{Label: "twin"})
			if !errors.Is(err, hsmkey.ErrAmbiguous) || !errors.Is(err, pkcs11.Error(code)) || !strings.Contains(err.Error(), "cannot be read") {
				t.Errorf("Key = %v, want ErrAmbiguous that says why", err)
			}
			if err := h.Delete(ctx, hsmkey.Query{Label: "twin"}); !errors.Is(err, hsmkey.ErrAmbiguous) {
				t.Errorf("Delete = %v, want ErrAmbiguous", err)
			}
			_, err = h.Key(ctx, hsmkey.Query{ID: []byte{2}})
			if !errors.Is(err, pkcs11.Error(code)) || errors.Is(err, hsmkey.ErrKeyNotFound) {
				t.Errorf("Key = %v, want %v", err, pkcs11.Error(code))
			}
			if _, err = h.Generate(ctx, "new", hsmkey.P256, []byte{2}); !errors.Is(err, hsmkey.ErrExists) {
				t.Errorf("Generate = %v, want ErrExists", err)
			}
			mustFind(t, h, hsmkey.Query{ID: []byte{1}})
			mustFind(t, h, hsmkey.Query{Label: "padded"})
			signOnce(t, byBoth)
		})
	}
}

func TestAKeyInUseIsNotHiddenByAnotherOneThatCannotBeRead(t *testing.T) {
	for _, code := range unreadables {
		t.Run(pkcs11.Error(code).Error(), func(t *testing.T) {
			test := testhsm.New(t)
			c := config(test)
			c.Pool.Wrap = func(m sessionpool.Module) sessionpool.Module {
				return unreadable{odd{m}, pkcs11.CKO_PRIVATE_KEY, pkcs11.CKA_ID, "\x02", code}
			}
			c.Pool.DisableCache = true // each session finds the key for itself
			h := open(t, c)
			key := generate(t, h, "twin", hsmkey.P256)
			key = mustFind(t, h, hsmkey.Query{Label: key.Label()})
			testhsm.GenerateEC(t, test, "twin", "02")
			signOnce(t, key) // it is proven by its public key
		})
	}
}

func TestASecretAndAPrivateKeyWithOneLabelAreAmbiguous(t *testing.T) {
	h := newHSM(t)
	generate(t, h, "twin", hsmkey.P256)
	createSecret(t, h, "twin", "another id", pkcs11.CKK_GENERIC_SECRET, make([]byte, 32))
	if _, err := h.Key(context.Background(), hsmkey.Query{Label: "twin"}); !errors.Is(err, hsmkey.ErrAmbiguous) {
		t.Errorf("Key = %v, want ErrAmbiguous", err)
	}
}

func TestOneSearchFindsAKeyWithItsPublicKeyAndProvesThatItIsAlone(t *testing.T) {
	var begun, ended atomic.Int32
	h := wrapped(t, func(m sessionpool.Module) sessionpool.Module { return counts{odd{m}, &begun, &ended} })
	for _, typ := range []hsmkey.KeyType{hsmkey.RSA2048, hsmkey.P256, hsmkey.HMAC256} {
		made := generate(t, h, string(typ), typ)
		for _, query := range []hsmkey.Query{{Label: made.Label()}, {ID: made.ID()}} {
			before := begun.Load()
			if _, err := h.Key(context.Background(), query); err != nil {
				t.Fatal(err)
			}
			if n := begun.Load() - before; n != 1 {
				t.Errorf("%s: %d searches, want one", query, n)
			}
		}
	}
}

func TestAModuleThatSearchesForOneClassOnlyFindsKeys(t *testing.T) {
	for _, code := range []uint{pkcs11.CKR_OK, pkcs11.CKR_TEMPLATE_INCOMPLETE, pkcs11.CKR_GENERAL_ERROR} {
		h := wrapped(t, func(m sessionpool.Module) sessionpool.Module { return wantsClass{odd{m}, code} })
		generate(t, h, "key", hsmkey.P256)
		generate(t, h, "twin", hsmkey.P256)
		createSecret(t, h, "twin", "another id", pkcs11.CKK_GENERIC_SECRET, make([]byte, 32))
		mustFind(t, h, hsmkey.Query{Label: "key"})
		if _, err := h.Key(context.Background(), hsmkey.Query{Label: "twin"}); !errors.Is(err, hsmkey.ErrAmbiguous) {
			t.Errorf("Key = %v, want ErrAmbiguous", err)
		}
		if err := h.Close(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestEveryMatchIsSeenWhenASearchYieldsOneHandleACall(t *testing.T) {
	h := wrapped(t, func(m sessionpool.Module) sessionpool.Module { return oneACall{odd{m}} })
	for _, label := range []string{"one", "two", "three"} {
		generate(t, h, label, hsmkey.P256)
	}
	mustFind(t, h, hsmkey.Query{Label: "three"})
	keys, err := h.Keys(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if len(keys) != 3 {
		t.Errorf("%d keys listed, want 3", len(keys))
	}
}

func TestObjectsThatTheSearchWasNotForAreIgnored(t *testing.T) {
	h := wrapped(t, func(m sessionpool.Module) sessionpool.Module { return listsAll{odd{m}} })
	generate(t, h, "rsa", hsmkey.RSA2048)
	generate(t, h, "ec", hsmkey.P256)
	generate(t, h, "hmac", hsmkey.HMAC256)
	for label, typ := range map[string]hsmkey.KeyType{"rsa": hsmkey.RSA2048, "ec": hsmkey.P256, "hmac": hsmkey.HMAC256} {
		if key := mustFind(t, h, hsmkey.Query{Label: label}); key.Type() != typ {
			t.Errorf("%q is %s, want %s", label, key.Type(), typ)
		}
	}
	if _, err := h.Key(context.Background(), hsmkey.Query{Label: "none"}); !errors.Is(err, hsmkey.ErrKeyNotFound) {
		t.Errorf("Key = %v, want ErrKeyNotFound", err)
	}
	keys, err := h.Keys(context.Background())
	if err != nil || len(keys) != 3 {
		t.Errorf("Keys = %d, %v, want 3 keys", len(keys), err)
	}
}

func TestALabelPaddedWithSpacesIsFound(t *testing.T) {
	h := wrapped(t, func(m sessionpool.Module) sessionpool.Module { return padded{odd{m}} })
	generate(t, h, "other", hsmkey.P256)
	made := generate(t, h, "padded", hsmkey.P256)
	key := mustFind(t, h, hsmkey.Query{Label: "padded"})
	if key.Label() != "padded" {
		t.Errorf("Label() = %q, want it without padding", key.Label())
	}
	mustFind(t, h, hsmkey.Query{Label: "padded", ID: made.ID()})
	if _, err := h.Generate(context.Background(), "padded", hsmkey.P256, nil); !errors.Is(err, hsmkey.ErrExists) {
		t.Errorf("Generate over a padded label = %v, want ErrExists", err)
	}
	if err := h.Delete(context.Background(), hsmkey.Query{Label: "padded"}); err != nil {
		t.Fatal(err)
	}
	if n := objects(t, h); n != 2 {
		t.Errorf("%d objects left, want the two of the other key", n)
	}
}

func TestAKeyWithAPaddedLabelAndNoIDFindsItsPublicKey(t *testing.T) {
	test := testhsm.New(t)
	// Another pair, whose label is the same but for the padding.
	for _, label := range []string{"pad", "pad     "} {
		testhsm.PKCS11Tool(t, test, "--keypairgen", "--key-type", "EC:prime256v1", "--label", label)
	}
	h := open(t, config(test))
	mustFind(t, h, hsmkey.Query{Label: "pad"})
	mustFind(t, h, hsmkey.Query{Label: "pad     "})
	remove(t, h, pkcs11.NewAttribute(pkcs11.CKA_LABEL, "pad"))
	mustFind(t, h, hsmkey.Query{Label: "pad"})
	for _, info := range listing(t, h) {
		signOnce(t, info.Key)
	}
	// A public key that is padded otherwise.
	do(t, h, func(m sessionpool.Module, session pkcs11.SessionHandle) error {
		both := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true)}
		_, _, err := m.GenerateKeyPair(session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
			append(slices.Clone(both), pkcs11.NewAttribute(pkcs11.CKA_LABEL, "half  "),
				pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07})),
			append(slices.Clone(both), pkcs11.NewAttribute(pkcs11.CKA_LABEL, "half"), pkcs11.NewAttribute(pkcs11.CKA_SIGN, true)))
		return err
	})
	mustFind(t, h, hsmkey.Query{Label: "half"})
	for _, label := range []string{"pad", "half"} {
		if err := h.Delete(context.Background(), hsmkey.Query{Label: label}); err != nil {
			t.Error(err)
		}
	}
	if n := objects(t, h); n != 0 {
		t.Errorf("%d objects left, want none", n)
	}
}

func TestASearchIsEndedOnEveryPath(t *testing.T) {
	var begun, ended atomic.Int32
	injector := fault.New()
	h := wrapped(t, func(m sessionpool.Module) sessionpool.Module {
		return counts{odd{injector.Wrap(m)}, &begun, &ended}
	})
	key := generate(t, h, "key", hsmkey.P256)
	for _, code := range []uint{pkcs11.CKR_ARGUMENTS_BAD, pkcs11.CKR_DEVICE_ERROR} {
		injector.Fail("C_FindObjects", 1, code)
		injector.Fail("C_FindObjects", 2, code)
		_, _ = h.Key(context.Background(), hsmkey.Query{Label: "key"})
		_, _ = h.Keys(context.Background())
	}
	injector.Clear()
	if begun.Load() != ended.Load() {
		t.Errorf("%d searches begun, %d ended", begun.Load(), ended.Load())
	}
	signOnce(t, key)
}

func TestAnHSMThatCannotBeAskedIsNeverAMissingKey(t *testing.T) {
	for _, function := range []string{"C_FindObjectsInit", "C_FindObjects", "C_FindObjectsFinal", "C_GetAttributeValue"} {
		for _, code := range []uint{pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_TOKEN_NOT_PRESENT} {
			t.Run(function+" "+pkcs11.Error(code).Error(), func(t *testing.T) {
				injector := fault.New()
				h := wrapped(t, injector.Wrap)
				made := generate(t, h, "key", hsmkey.P256)
				injector.FailAll(function, code)
				_, err := h.Key(context.Background(), hsmkey.Query{Label: "key"})
				if !errors.Is(err, hsmkey.ErrSession) || errors.Is(err, hsmkey.ErrKeyNotFound) {
					t.Errorf("Key = %v, want ErrSession and not ErrKeyNotFound", err)
				}
				_, err = h.Key(context.Background(), hsmkey.Query{Label: "no such key"})
				if !errors.Is(err, hsmkey.ErrSession) && function != "C_GetAttributeValue" {
					t.Errorf("Key of an unknown key = %v, want ErrSession", err)
				}
				injector.Clear()
				mustFind(t, h, hsmkey.Query{ID: made.ID()})
			})
		}
	}
}

func TestOneFailureOfASearchIsNotTheCallersConcern(t *testing.T) {
	injector := fault.New()
	h := wrapped(t, injector.Wrap)
	generate(t, h, "key", hsmkey.P256)
	for _, function := range []string{"C_FindObjectsInit", "C_FindObjects", "C_GetAttributeValue"} {
		injector.Fail(function, 1, pkcs11.CKR_DEVICE_ERROR)
		mustFind(t, h, hsmkey.Query{Label: "key"})
	}
}

func TestWithoutALoginTheErrorSaysThatThePINIsMissing(t *testing.T) {
	test := testhsm.New(t)
	h, err := hsmkey.Open(context.Background(), config(test))
	if err != nil {
		t.Fatal(err)
	}
	generate(t, h, "key", hsmkey.P256)
	if err := h.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	c := config(test)
	c.Pool.PIN = nil
	_, err = open(t, c).Key(context.Background(), hsmkey.Query{Label: "key"})
	if !errors.Is(err, hsmkey.ErrKeyNotFound) || !strings.Contains(err.Error(), "not logged in") {
		t.Errorf("Key = %v, want ErrKeyNotFound with a hint", err)
	}
}

func TestLookingAKeyUpAgainAndAgainDoesNotFillTheSession(t *testing.T) {
	h := newHSM(t)
	generate(t, h, "key", hsmkey.RSA2048)
	lookUp := func(n int) {
		for range n {
			if _, err := h.Key(context.Background(), hsmkey.Query{Label: "key"}); err != nil {
				t.Fatal(err)
			}
		}
	}
	heap := func() uint64 {
		var stats runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&stats)
		return stats.HeapAlloc
	}
	lookUp(100)
	before := heap()
	const n = 2000
	lookUp(n)
	if grown := int64(heap()) - int64(before); grown > n*64 {
		t.Errorf("%d lookups hold %d bytes", n, grown)
	}
}

// endless yields the same object for ever.
type endless struct{ odd }

func (o endless) FindObjects(pkcs11.SessionHandle, int) ([]pkcs11.ObjectHandle, bool, error) {
	return make([]pkcs11.ObjectHandle, 1<<12), true, nil
}

func TestASearchThatDoesNotEndIsGivenUp(t *testing.T) {
	h := wrapped(t, func(m sessionpool.Module) sessionpool.Module { return endless{odd{m}} })
	if _, err := h.Keys(context.Background()); !errors.Is(err, hsmkey.ErrUnsupported) {
		t.Errorf("Keys = %v, want ErrUnsupported", err)
	}
}

func TestAttributesAreReadOneByOneWhereTheyCannotBeReadTogether(t *testing.T) {
	h := wrapped(t, func(m sessionpool.Module) sessionpool.Module { return oneAttribute{odd{m}} })
	for _, typ := range []hsmkey.KeyType{hsmkey.RSA2048, hsmkey.P256, hsmkey.Ed25519, hsmkey.HMAC256} {
		made := generate(t, h, string(typ), typ)
		mustFind(t, h, hsmkey.Query{Label: string(typ), ID: made.ID()})
	}
}
