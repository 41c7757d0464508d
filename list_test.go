package hsmkey_test

import (
	"context"
	"errors"
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

// listing is a listing by label.
func listing(tb testing.TB, h *hsmkey.HSM) map[string]hsmkey.KeyInfo {
	tb.Helper()
	keys, err := h.Keys(context.Background())
	if err != nil {
		tb.Fatal(err)
	}
	byLabel := map[string]hsmkey.KeyInfo{}
	for _, info := range keys {
		if (info.Key == nil) == (info.Err == nil) {
			tb.Errorf("%q has key %v and error %v, want one of them", info.Label, info.Key, info.Err)
		}
		byLabel[info.Label] = info
	}
	if len(byLabel) != len(keys) {
		tb.Errorf("%d keys with %d labels", len(keys), len(byLabel))
	}
	return byLabel
}

func TestAnEmptyTokenListsNothing(t *testing.T) {
	keys, err := newHSM(t).Keys(context.Background())
	if err != nil || len(keys) != 0 {
		t.Errorf("Keys = %v, %v", keys, err)
	}
}

func TestKeysAreListedByLabelAndSign(t *testing.T) {
	h := newHSM(t)
	for label, typ := range map[string]hsmkey.KeyType{"c": hsmkey.RSA2048, "a": hsmkey.P256, "b": hsmkey.Ed25519, "d": hsmkey.HMAC256} {
		generate(t, h, label, typ)
	}
	keys, err := h.Keys(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	var labels string
	for _, info := range keys {
		labels += info.Label
		if info.Err != nil {
			t.Errorf("%q: %v", info.Label, info.Err)
			continue
		}
		signOnce(t, info.Key)
	}
	if labels != "abcd" {
		t.Errorf("listed %q, want abcd", labels)
	}
}

func TestTwoKeysWithOneLabelAreBothListedAndSign(t *testing.T) {
	test := testhsm.New(t)
	testhsm.GenerateEC(t, test, "twin", "01")
	testhsm.GenerateEC(t, test, "twin", "02")
	keys, err := open(t, config(test)).Keys(context.Background())
	if err != nil || len(keys) != 2 {
		t.Fatalf("Keys = %v, %v", keys, err)
	}
	for i, info := range keys {
		if info.Err != nil || info.ID[0] != byte(i+1) {
			t.Fatalf("%d: id %x, %v", i, info.ID, info.Err)
		}
		signOnce(t, info.Key)
	}
}

func TestOneOddKeyDoesNotHideTheOthers(t *testing.T) {
	test := testhsm.New(t)
	testhsm.PKCS11Tool(t, test, "--keypairgen", "--key-type", "EC:secp256k1", "--label", "secp256k1", "--id", "01")
	h := open(t, config(test))
	generate(t, h, "good", hsmkey.P256)
	createSecret(t, h, "aes", "02", pkcs11.CKK_AES, make([]byte, 32))
	createSecret(t, h, "short", "03", pkcs11.CKK_GENERIC_SECRET, make([]byte, 31), pkcs11.NewAttribute(pkcs11.CKA_SIGN, true))
	createSecret(t, h, "not for signing", "04", pkcs11.CKK_GENERIC_SECRET, make([]byte, 32), pkcs11.NewAttribute(pkcs11.CKA_SIGN, false))
	do(t, h, func(m sessionpool.Module, session pkcs11.SessionHandle) error {
		both := []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, "for decryption"),
			pkcs11.NewAttribute(pkcs11.CKA_ID, "05"),
		}
		_, _, err := m.GenerateKeyPair(session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, nil)},
			append(slices.Clone(both), pkcs11.NewAttribute(pkcs11.CKA_MODULUS_BITS, 2048)),
			append(slices.Clone(both), pkcs11.NewAttribute(pkcs11.CKA_SIGN, false)))
		return err
	})
	alone := generate(t, h, "without public key", hsmkey.P256)
	removePublic(t, h, alone)

	keys := listing(t, h)
	for label, want := range map[string]string{
		"secp256k1":          "1.3.132.0.10",
		"aes":                "AES",
		"short":              "31 bytes",
		"not for signing":    "CKA_SIGN",
		"for decryption":     "CKA_SIGN",
		"without public key": "public key",
	} {
		info := keys[label]
		if info.Err == nil || !strings.Contains(info.Err.Error(), want) || !strings.Contains(info.Err.Error(), label) {
			t.Errorf("%q: %v, want an error with %q", label, info.Err, want)
		}
		_, err := h.Key(context.Background(), hsmkey.Query{Label: label})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Key(%q) = %v, want an error with %q", label, err, want)
		}
	}
	for _, label := range []string{"secp256k1", "aes", "short", "not for signing", "for decryption"} {
		if !errors.Is(keys[label].Err, hsmkey.ErrUnsupported) {
			t.Errorf("%q: %v, want ErrUnsupported", label, keys[label].Err)
		}
	}
	signOnce(t, keys["good"].Key)
	if len(keys) != 7 {
		t.Errorf("%d keys listed, want 7", len(keys))
	}
}

// unreadables are what a module may answer when asked for an object that it lists
// and does not let anybody read.
var unreadables = []uint{pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_OBJECT_HANDLE_INVALID, 0x80000001}

func TestAnObjectThatCannotBeReadDoesNotHideTheOthers(t *testing.T) {
	for _, code := range append(unreadables, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID) {
		t.Run(pkcs11.Error(code).Error(), func(t *testing.T) {
			test := testhsm.New(t)
			testhsm.GenerateEC(t, test, "good", "01")
			testhsm.GenerateEC(t, test, "bad", "02")
			c := config(test)
			c.Pool.Wrap = func(m sessionpool.Module) sessionpool.Module {
				return unreadable{odd{m}, pkcs11.CKO_PRIVATE_KEY, pkcs11.CKA_ID, "\x02", code}
			}
			h := open(t, c)
			keys, err := h.Keys(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			good := 0
			for _, info := range keys {
				if info.Err == nil {
					good++
					signOnce(t, info.Key)
				}
			}
			if good != 1 || keys[len(keys)-1].Label != "good" {
				t.Errorf("listed %v, want the good key among them", keys)
			}
			mustFind(t, h, hsmkey.Query{Label: "good"})
			if _, err := h.Key(context.Background(), hsmkey.Query{Label: "bad"}); err == nil {
				t.Error("a key that cannot be read was found")
			}
		})
	}
}

// breaksDown stops answering anything from the first read of an attribute on.
type breaksDown struct {
	odd
	injector *fault.Injector
	armed    *atomic.Bool
}

func (o breaksDown) GetAttributeValue(h pkcs11.SessionHandle, object pkcs11.ObjectHandle, a []*pkcs11.Attribute) ([]*pkcs11.Attribute, error) {
	if o.armed.Load() {
		for _, function := range []string{"C_GetAttributeValue", "C_GetSessionInfo"} {
			o.injector.FailAll(function, pkcs11.CKR_DEVICE_ERROR)
		}
	}
	return o.Module.GetAttributeValue(h, object, a)
}

func TestListingFailsWhenTheHSMDoes(t *testing.T) {
	injector := fault.New()
	var armed atomic.Bool
	h := wrapped(t, func(m sessionpool.Module) sessionpool.Module {
		return breaksDown{odd{injector.Wrap(m)}, injector, &armed}
	})
	generate(t, h, "key", hsmkey.HMAC256) // of the class that is listed last
	armed.Store(true)
	keys, err := h.Keys(context.Background())
	if !errors.Is(err, hsmkey.ErrSession) || keys != nil {
		t.Errorf("Keys = %v, %v, want ErrSession", keys, err)
	}
	armed.Store(false)
	injector.Clear()
	if len(listing(t, h)) != 1 {
		t.Error("the key is not listed afterwards")
	}
}
