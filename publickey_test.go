package hsmkey_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/fault"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// certify puts a self-signed certificate of a key on the HSM onto the token.
func certify(tb testing.TB, h *hsmkey.HSM, key crypto.Signer, label, id string) {
	tb.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{CommonName: label},
		NotAfter:     time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		tb.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	serial, err := asn1.Marshal(certificate.SerialNumber)
	if err != nil {
		tb.Fatal(err)
	}
	create(tb, h, label, id,
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_CERTIFICATE),
		pkcs11.NewAttribute(pkcs11.CKA_CERTIFICATE_TYPE, pkcs11.CKC_X_509),
		pkcs11.NewAttribute(pkcs11.CKA_SUBJECT, certificate.RawSubject),
		pkcs11.NewAttribute(pkcs11.CKA_ISSUER, certificate.RawIssuer),
		pkcs11.NewAttribute(pkcs11.CKA_SERIAL_NUMBER, serial),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE, der))
}

// removePublic takes the public-key object of a key off the token.
func removePublic(tb testing.TB, h *hsmkey.HSM, key *hsmkey.HSMJWK) {
	tb.Helper()
	remove(tb, h, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), pkcs11.NewAttribute(pkcs11.CKA_ID, key.ID()))
}

func TestAMissingPublicKeyObjectIsReplacedByTheCertificate(t *testing.T) {
	h := newHSM(t)
	for _, typ := range []hsmkey.KeyType{hsmkey.RSA2048, hsmkey.P256, hsmkey.P384, hsmkey.P521, hsmkey.Ed25519} {
		made := generate(t, h, string(typ), typ)
		certify(t, h, made, "a certificate", string(made.ID()))
		certify(t, h, made, "its renewal", string(made.ID()))
		removePublic(t, h, made)
		found := mustFind(t, h, hsmkey.Query{Label: string(typ)})
		if found.Type() != typ || !samePublic(found.Public(), made.Public()) {
			t.Errorf("%s: found %s with another public key", typ, found.Type())
		}
	}
}

func TestAnRSAKeyTellsItsPublicKeyItself(t *testing.T) {
	h := newHSM(t)
	made := generate(t, h, "rsa", hsmkey.RSA2048)
	removePublic(t, h, made)
	if found := mustFind(t, h, hsmkey.Query{Label: "rsa"}); !samePublic(found.Public(), made.Public()) {
		t.Error("another public key")
	}
}

func TestAnECKeyWithoutAnyPublicKeyIsNotFoundAndSaysWhy(t *testing.T) {
	h := newHSM(t)
	made := generate(t, h, "ec", hsmkey.P256)
	other := generate(t, h, "other", hsmkey.P256)
	certify(t, h, other, "ec", "another id")
	removePublic(t, h, made)
	_, err := h.Key(context.Background(), hsmkey.Query{Label: "ec"})
	if !errors.Is(err, hsmkey.ErrKeyNotFound) || !strings.Contains(err.Error(), "public key") {
		t.Errorf("Key = %v, want ErrKeyNotFound that speaks of the public key", err)
	}
}

// createPublic puts the public-key object of an EC key onto the token.
func createPublic(tb testing.TB, h *hsmkey.HSM, key *ecdsa.PublicKey, label, id string) {
	tb.Helper()
	bare, err := key.Bytes()
	if err != nil {
		tb.Fatal(err)
	}
	point, err := asn1.Marshal(bare)
	if err != nil {
		tb.Fatal(err)
	}
	create(tb, h, label, id,
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC),
		pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}),
		pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, point))
}

func TestAPublicObjectThatCannotBeReadDoesNotHideTheKey(t *testing.T) {
	for _, code := range unreadables {
		t.Run(pkcs11.Error(code).Error(), func(t *testing.T) {
			injector := fault.New()
			h := wrapped(t, func(m sessionpool.Module) sessionpool.Module {
				return unreadable{odd{injector.Wrap(m)}, pkcs11.CKO_PUBLIC_KEY, pkcs11.CKA_LABEL, "odd", code}
			})
			other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			// Whichever the token yields first.
			createPublic(t, h, &other.PublicKey, "odd", "\x01")
			made, err := h.Generate(context.Background(), "key", hsmkey.P256, []byte{1})
			if err != nil {
				t.Fatal(err)
			}
			createPublic(t, h, &other.PublicKey, "odd", "\x01")
			before := stats(t, h)
			for range 5 {
				if found := mustFind(t, h, hsmkey.Query{Label: "key"}); !samePublic(found.Public(), made.Public()) {
					t.Fatal("another public key")
				}
			}
			if now := stats(t, h); now.ClosedLost != before.ClosedLost || injector.Calls("C_Initialize") != 1 {
				t.Errorf("%d sessions were lost and the module was initialised %d times for the object's sake",
					now.ClosedLost-before.ClosedLost, injector.Calls("C_Initialize"))
			}
			// The public key may be found by its label only.
			remove(t, h, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), pkcs11.NewAttribute(pkcs11.CKA_LABEL, "key"))
			createPublic(t, h, made.Public().(*ecdsa.PublicKey), "key", "") //nolint:errcheck // a P-256 key
			mustFind(t, h, hsmkey.Query{Label: "key"})
			err = h.Delete(context.Background(), hsmkey.Query{Label: "key"})
			if !errors.Is(err, pkcs11.Error(code)) || !strings.Contains(err.Error(), "is deleted") {
				t.Errorf("Delete = %v, want an error that tells of the object that stays", err)
			}
			if n := objects(t, h); n != 2 {
				t.Errorf("%d objects are left, want the two that cannot be read", n)
			}
		})
	}
}

func TestAPublicKeyThatCannotBeReadIsNotAMissingOne(t *testing.T) {
	for _, code := range unreadables {
		var on atomic.Bool
		h := wrapped(t, func(m sessionpool.Module) sessionpool.Module {
			return while{odd{m}, &on, unreadable{odd{m}, pkcs11.CKO_PUBLIC_KEY, pkcs11.CKA_LABEL, "key", code}}
		})
		generate(t, h, "key", hsmkey.P256)
		on.Store(true)
		_, err := h.Key(context.Background(), hsmkey.Query{Label: "key"})
		if !errors.Is(err, pkcs11.Error(code)) || errors.Is(err, hsmkey.ErrKeyNotFound) {
			t.Errorf("Key = %v, want %v", err, pkcs11.Error(code))
		}
		if err := h.Close(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestPublicKeyInfoIsReadWhereThereIsNothingElse(t *testing.T) {
	var info []byte
	h := wrapped(t, func(m sessionpool.Module) sessionpool.Module {
		return privateTells{odd{m}, pkcs11.CKA_PUBLIC_KEY_INFO, &info}
	})
	made := generate(t, h, "alone", hsmkey.P256)
	var err error
	if info, err = x509.MarshalPKIXPublicKey(made.Public()); err != nil {
		t.Fatal(err)
	}
	removePublic(t, h, made)
	if found := mustFind(t, h, hsmkey.Query{Label: "alone"}); !samePublic(found.Public(), made.Public()) {
		t.Error("another public key")
	}
	info = info[:40]
	if _, err := h.Key(context.Background(), hsmkey.Query{Label: "alone"}); !errors.Is(err, hsmkey.ErrKeyNotFound) {
		t.Errorf("with half of it: %v, want ErrKeyNotFound", err)
	}
}

func TestDifferentPublicKeysOfOneKeyAreAmbiguousUnlessTheLabelDecides(t *testing.T) {
	h := newHSM(t)
	made := generate(t, h, "mine", hsmkey.P256)
	other := as[*ecdsa.PublicKey](generate(t, h, "other", hsmkey.P256).Public())
	queries := []hsmkey.Query{{Label: "mine"}, {ID: made.ID()}, {Label: "mine", ID: made.ID()}}
	for _, label := range []string{"a stranger", "mine   "} {
		createPublic(t, h, other, label, string(made.ID()))
		for _, query := range queries {
			if found := mustFind(t, h, query); !samePublic(found.Public(), made.Public()) {
				t.Errorf("%s: the public key of %q was taken", query, label)
			}
		}
	}
	createPublic(t, h, other, "mine", string(made.ID()))
	for _, query := range queries {
		if _, err := h.Key(context.Background(), query); !errors.Is(err, hsmkey.ErrAmbiguous) {
			t.Errorf("%s: %v, want ErrAmbiguous", query, err)
		}
	}
}

func TestTheLabelDecidesButForItsPaddingWhereNoneIsTheSame(t *testing.T) {
	h := newHSM(t)
	made := generate(t, h, "mine", hsmkey.P256)
	other := as[*ecdsa.PublicKey](generate(t, h, "other", hsmkey.P256).Public())
	removePublic(t, h, made)
	createPublic(t, h, other, "a stranger", string(made.ID()))
	createPublic(t, h, as[*ecdsa.PublicKey](made.Public()), "mine   ", string(made.ID()))
	if found := mustFind(t, h, hsmkey.Query{Label: "mine"}); !samePublic(found.Public(), made.Public()) {
		t.Error("the stranger's public key was taken")
	}
}

func TestKeysWithoutIDsAreNotTakenForEachOther(t *testing.T) {
	test := testhsm.New(t)
	for _, label := range []string{"mine", "other"} {
		testhsm.PKCS11Tool(t, test, "--keypairgen", "--key-type", "EC:prime256v1", "--label", label)
	}
	h := open(t, config(test))
	remove(t, h, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), pkcs11.NewAttribute(pkcs11.CKA_LABEL, "mine"))
	if err := h.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	c := config(test)
	c.Pool.Wrap = func(m sessionpool.Module) sessionpool.Module { return listsAll{odd{m}} }
	h = open(t, c)
	mustFind(t, h, hsmkey.Query{Label: "other"})
	if key, err := h.Key(context.Background(), hsmkey.Query{Label: "mine"}); !errors.Is(err, hsmkey.ErrKeyNotFound) {
		t.Errorf("Key = %v, %v, want ErrKeyNotFound", key, err)
	}
}

func TestAPublicKeyOfTheSameLabelWithAnotherIDIsNotTaken(t *testing.T) {
	h := newHSM(t)
	made := generate(t, h, "mine", hsmkey.P256)
	other := as[*ecdsa.PublicKey](generate(t, h, "other", hsmkey.P256).Public())
	removePublic(t, h, made)
	createPublic(t, h, other, "mine", "another id")
	if _, err := h.Key(context.Background(), hsmkey.Query{Label: "mine"}); !errors.Is(err, hsmkey.ErrKeyNotFound) {
		t.Errorf("Key = %v, want ErrKeyNotFound", err)
	}
	createPublic(t, h, as[*ecdsa.PublicKey](made.Public()), "another label", string(made.ID()))
	if found := mustFind(t, h, hsmkey.Query{Label: "mine"}); !samePublic(found.Public(), made.Public()) {
		t.Error("another public key")
	}
}

// privateTells has private EC objects that tell their public key by one attribute.
type privateTells struct {
	odd
	attribute uint
	value     *[]byte
}

func (o privateTells) GetAttributeValue(h pkcs11.SessionHandle, object pkcs11.ObjectHandle, a []*pkcs11.Attribute) ([]*pkcs11.Attribute, error) {
	i := slices.IndexFunc(a, func(a *pkcs11.Attribute) bool { return a.Type == o.attribute })
	class, err := o.Module.GetAttributeValue(h, object, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, nil)})
	if i < 0 || err != nil || !slices.Equal(class[0].Value, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY).Value) {
		return o.Module.GetAttributeValue(h, object, a)
	}
	others := slices.Delete(slices.Clone(a), i, i+1)
	var got []*pkcs11.Attribute
	if len(others) > 0 {
		if got, err = o.Module.GetAttributeValue(h, object, others); err != nil {
			return nil, err
		}
	}
	return slices.Insert(got, i, pkcs11.NewAttribute(o.attribute, *o.value)), nil
}

func TestWhatAPrivateObjectTellsIsBelievedBeforeAPublicObjectOfItsName(t *testing.T) {
	for name, attribute := range map[string]uint{"CKA_EC_POINT": pkcs11.CKA_EC_POINT, "CKA_PUBLIC_KEY_INFO": pkcs11.CKA_PUBLIC_KEY_INFO} {
		t.Run(name, func(t *testing.T) {
			var told []byte
			h := wrapped(t, func(m sessionpool.Module) sessionpool.Module {
				return privateTells{odd{m}, attribute, &told}
			})
			made := generate(t, h, "mine", hsmkey.P256)
			bare, err := as[*ecdsa.PublicKey](made.Public()).Bytes()
			if err == nil && attribute == pkcs11.CKA_EC_POINT {
				told, err = asn1.Marshal(bare)
			} else if err == nil {
				told, err = x509.MarshalPKIXPublicKey(made.Public())
			}
			if err != nil {
				t.Fatal(err)
			}
			other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			stale := &other.PublicKey
			createPublic(t, h, stale, "mine", string(made.ID()))
			for range 2 { // the second time the stale one alone
				if found := mustFind(t, h, hsmkey.Query{Label: "mine"}); !samePublic(found.Public(), made.Public()) {
					t.Error("the public object was believed")
				}
				removePublic(t, h, made)
				createPublic(t, h, stale, "mine", string(made.ID()))
			}
		})
	}
}

func TestAPublicKeyObjectWithoutIDIsFoundByItsLabel(t *testing.T) {
	h := newHSM(t)
	made := generate(t, h, "mine", hsmkey.P256)
	removePublic(t, h, made)
	bare, err := as[*ecdsa.PublicKey](made.Public()).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	create(t, h, "mine", "",
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC),
		pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}),
		pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, append([]byte{0x04, 0x41}, bare...)))
	mustFind(t, h, hsmkey.Query{Label: "mine"})
}

func TestPointsAndCurvesAreReadAsModulesWriteThem(t *testing.T) {
	unwrap := func(value []byte) ([]byte, error) {
		var bare []byte
		if _, err := asn1.Unmarshal(value, &bare); err != nil {
			return nil, err
		}
		return bare, nil
	}
	shortHeader := func(value []byte) ([]byte, error) {
		bare, err := unwrap(value)
		return append([]byte{0x04, byte(len(bare))}, bare...), err
	}
	byName := func([]byte) ([]byte, error) { return asn1.MarshalWithParams("edwards25519", "printable") }
	for _, test := range []struct {
		name      string
		typ       hsmkey.KeyType
		attribute uint
		change    func([]byte) ([]byte, error)
	}{
		{"a raw point on P-256", hsmkey.P256, pkcs11.CKA_EC_POINT, unwrap},
		{"a raw point on P-384", hsmkey.P384, pkcs11.CKA_EC_POINT, unwrap},
		{"a raw point on P-521", hsmkey.P521, pkcs11.CKA_EC_POINT, unwrap},
		{"a raw point on Ed25519", hsmkey.Ed25519, pkcs11.CKA_EC_POINT, unwrap},
		{"a malformed header on P-521", hsmkey.P521, pkcs11.CKA_EC_POINT, shortHeader},
		{"Ed25519 by name", hsmkey.Ed25519, pkcs11.CKA_EC_PARAMS, byName},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := wrapped(t, func(m sessionpool.Module) sessionpool.Module {
				return answers{odd{m}, test.attribute, test.change}
			})
			generate(t, h, "key", test.typ)
			if found := mustFind(t, h, hsmkey.Query{Label: "key"}); found.Type() != test.typ {
				t.Errorf("found %s", found.Type())
			}
		})
	}
}
