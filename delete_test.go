package hsmkey_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/fault"
	"github.com/hsmkey/hsmkey/internal/testhsm"
)

func TestDeleteRemovesBothHalvesAndNothingElse(t *testing.T) {
	h := newHSM(t)
	for _, typ := range []hsmkey.KeyType{hsmkey.RSA2048, hsmkey.P256, hsmkey.Ed25519, hsmkey.HMAC256} {
		generate(t, h, "keep "+string(typ), typ)
	}
	before := objects(t, h)
	for _, typ := range []hsmkey.KeyType{hsmkey.RSA2048, hsmkey.P256, hsmkey.Ed25519, hsmkey.HMAC256} {
		made := generate(t, h, "drop", typ)
		certifyIfPublic(t, h, made)
		if err := h.Delete(context.Background(), hsmkey.Query{Label: "drop"}); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Key(context.Background(), hsmkey.Query{Label: "drop"}); !errors.Is(err, hsmkey.ErrKeyNotFound) {
			t.Errorf("%s: Key = %v, want ErrKeyNotFound", typ, err)
		}
		if made.Public() != nil {
			remove(t, h, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_CERTIFICATE), pkcs11.NewAttribute(pkcs11.CKA_ID, made.ID()))
		}
		if n := objects(t, h); n != before {
			t.Errorf("%s: %d objects are left, want %d", typ, n, before)
		}
		if _, err := made.SignJWS(context.Background(), made.Algorithms()[0], nil); !errors.Is(err, hsmkey.ErrKeyNotFound) {
			t.Errorf("%s: signing with the deleted key: %v, want ErrKeyNotFound", typ, err)
		}
	}
	for label, info := range listing(t, h) {
		if !strings.HasPrefix(label, "keep ") || info.Err != nil {
			t.Errorf("%q is left, %v", label, info.Err)
		}
	}
}

func TestAPublicKeyWhoseLabelIsPaddedOtherwiseIsDeletedOnlyWhereNoneIsNot(t *testing.T) {
	h := newHSM(t)
	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for left, label := range []string{"alone", "mine"} {
		made := generate(t, h, label, hsmkey.P256)
		createPublic(t, h, &stranger.PublicKey, label+"   ", string(made.ID()))
		if label == "alone" {
			remove(t, h, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), pkcs11.NewAttribute(pkcs11.CKA_LABEL, label))
		}
		if err := h.Delete(context.Background(), hsmkey.Query{Label: label}); err != nil {
			t.Fatal(err)
		}
		if n := objects(t, h); n != left {
			t.Errorf("%q: %d objects are left, want %d", label, n, left)
		}
	}
}

func certifyIfPublic(tb testing.TB, h *hsmkey.HSM, key *hsmkey.HSMJWK) {
	tb.Helper()
	if key.Public() != nil {
		certify(tb, h, key, key.Label(), string(key.ID()))
	}
}

func TestDeletingAnUnknownKeyRemovesNothing(t *testing.T) {
	h := newHSM(t)
	made := generate(t, h, "key", hsmkey.P256)
	for _, query := range []hsmkey.Query{{Label: "other"}, {ID: []byte("other")}, {Label: "key", ID: []byte("other")}, {Label: "other", ID: made.ID()}} {
		if err := h.Delete(context.Background(), query); !errors.Is(err, hsmkey.ErrKeyNotFound) {
			t.Errorf("Delete(%s) = %v, want ErrKeyNotFound", query, err)
		}
	}
	signOnce(t, made)
}

func TestAnotherKeysPublicHalfStays(t *testing.T) {
	test := testhsm.New(t)
	testhsm.GenerateEC(t, test, "drop", "01")
	testhsm.GenerateEC(t, test, "keep", "01")
	h := open(t, config(test))
	if err := h.Delete(context.Background(), hsmkey.Query{Label: "drop"}); err != nil {
		t.Fatal(err)
	}
	mustFind(t, h, hsmkey.Query{Label: "keep"})
	if n := objects(t, h); n != 2 {
		t.Errorf("%d objects left, want the pair of the other key", n)
	}
}

func TestAnOddKeyCanBeDeleted(t *testing.T) {
	test := testhsm.New(t)
	testhsm.PKCS11Tool(t, test, "--keypairgen", "--key-type", "EC:secp256k1", "--label", "odd", "--id", "01")
	h := open(t, config(test))
	if err := h.Delete(context.Background(), hsmkey.Query{Label: "odd"}); err != nil {
		t.Fatal(err)
	}
	if n := objects(t, h); n != 0 {
		t.Errorf("%d objects left", n)
	}
}

func TestADeletionIsNeverRepeatedAndSaysWhatIsLeft(t *testing.T) {
	injector := fault.New()
	h := wrapped(t, injector.Wrap)
	generate(t, h, "key", hsmkey.P256)

	injector.Fail("C_DestroyObject", 1, pkcs11.CKR_DEVICE_ERROR)
	if err := h.Delete(context.Background(), hsmkey.Query{Label: "key"}); !errors.Is(err, hsmkey.ErrSession) {
		t.Errorf("Delete = %v, want ErrSession", err)
	}
	if n := injector.Calls("C_DestroyObject"); n != 1 {
		t.Errorf("C_DestroyObject was called %d times, want once", n)
	}
	mustFind(t, h, hsmkey.Query{Label: "key"})

	injector.Fail("C_DestroyObject", 1, pkcs11.CKR_ACTION_PROHIBITED)
	if err := h.Delete(context.Background(), hsmkey.Query{Label: "key"}); !errors.Is(err, hsmkey.ErrUnsupported) {
		t.Errorf("Delete of an indestructible key = %v, want ErrUnsupported", err)
	}
	mustFind(t, h, hsmkey.Query{Label: "key"})

	injector.Fail("C_DestroyObject", 2, pkcs11.CKR_FUNCTION_NOT_SUPPORTED)
	err := h.Delete(context.Background(), hsmkey.Query{Label: "key"})
	if err == nil || !strings.Contains(err.Error(), "its public key is not") {
		t.Errorf("Delete = %v, want an error about the public key", err)
	}
	if n := objects(t, h); n != 1 {
		t.Errorf("%d objects left, want the public key", n)
	}
}
