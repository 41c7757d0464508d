package hsmkey_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"math/big"
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

// newKeys makes one private key of each kind that can be imported.
func newKeys(tb testing.TB) map[hsmkey.KeyType]crypto.Signer {
	tb.Helper()
	keys := map[hsmkey.KeyType]crypto.Signer{}
	var err error
	if keys[hsmkey.RSA2048], err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		tb.Fatal(err)
	}
	for typ, curve := range map[hsmkey.KeyType]elliptic.Curve{
		hsmkey.P256: elliptic.P256(), hsmkey.P384: elliptic.P384(), hsmkey.P521: elliptic.P521(),
	} {
		if keys[typ], err = ecdsa.GenerateKey(curve, rand.Reader); err != nil {
			tb.Fatal(err)
		}
	}
	if _, keys[hsmkey.Ed25519], err = ed25519.GenerateKey(rand.Reader); err != nil {
		tb.Fatal(err)
	}
	return keys
}

func TestEveryKindOfKeyIsImportedAndSigns(t *testing.T) {
	h := newHSM(t)
	for typ, key := range newKeys(t) {
		made, err := h.Import(context.Background(), string(typ), key, []byte(typ))
		if err != nil {
			t.Errorf("%s: %v", typ, err)
			continue
		}
		if made.Type() != typ || string(made.ID()) != string(typ) || !samePublic(made.Public(), key.Public()) {
			t.Errorf("%s came out as %s with id %x", typ, made.Type(), made.ID())
		}
		found := mustFind(t, h, hsmkey.Query{Label: string(typ)})
		if !samePublic(found.Public(), key.Public()) {
			t.Errorf("%s is found with another public key", typ)
		}
	}
}

func TestAnECKeyWithLeadingZerosIsImported(t *testing.T) {
	h := newHSM(t)
	for label, curve := range map[string]elliptic.Curve{"P-256": elliptic.P256(), "P-521": elliptic.P521()} {
		key, err := ecdsa.ParseRawPrivateKey(curve, append(make([]byte, (curve.Params().BitSize+7)/8-1), 7))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.Import(context.Background(), label, key, nil); err != nil {
			t.Errorf("%s: %v", label, err)
		}
		mustFind(t, h, hsmkey.Query{Label: label})
	}
}

func TestSecretsAreImportedAndSignByEveryHashThatTheySuit(t *testing.T) {
	h := newHSM(t)
	for size, want := range map[int][]hsmkey.Algorithm{
		32:  {hsmkey.HS256},
		47:  {hsmkey.HS256},
		48:  {hsmkey.HS384, hsmkey.HS256},
		64:  {hsmkey.HS512, hsmkey.HS384, hsmkey.HS256},
		100: {hsmkey.HS512, hsmkey.HS384, hsmkey.HS256},
	} {
		secret := make([]byte, size)
		rand.Read(secret)
		key, err := h.Import(context.Background(), "secret "+string(rune('A'+size-32)), secret, nil)
		if err != nil {
			t.Errorf("%d bytes: %v", size, err)
			continue
		}
		if !slices.Equal(key.Algorithms(), want) {
			t.Errorf("%d bytes sign %v, want %v", size, key.Algorithms(), want)
		}
		if key.Public() != nil {
			t.Errorf("an HMAC key has the public key %v", key.Public())
		}
		mac, err := key.SignJWS(context.Background(), hsmkey.HS256, []byte("input"))
		if err != nil {
			t.Fatal(err)
		}
		own := hmac.New(sha256.New, secret)
		own.Write([]byte("input"))
		if !hmac.Equal(mac, own.Sum(nil)) {
			t.Errorf("%d bytes: the HSM computes another code", size)
		}
	}
}

// The keys of RFC 7515 appendices A.1 to A.3 and RFC 8037 appendix A.1, by the
// signatures that are published with them.
func TestTheKeysOfTheRFCsSignAsPublished(t *testing.T) {
	ctx := context.Background()
	h := newHSM(t)
	b64 := func(s string) []byte {
		b, err := base64.RawURLEncoding.DecodeString(strings.Join(strings.Fields(s), ""))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	secret, err := h.Import(ctx, "RFC 7515 A.1", b64(`AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75
		aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow`), nil)
	if err != nil {
		t.Fatal(err)
	}
	seed := b64("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A")
	edwards, err := h.Import(ctx, "RFC 8037 A.1", ed25519.NewKeyFromSeed(seed), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		key       *hsmkey.HSMJWK
		algorithm hsmkey.Algorithm
		input     string
		want      string
	}{
		{
			secret, hsmkey.HS256,
			"eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ",
			"dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk",
		},
		{
			edwards, hsmkey.EdDSA,
			"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc",
			"hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg",
		},
	} {
		got, err := test.key.SignJWS(ctx, test.algorithm, []byte(test.input))
		if err != nil {
			t.Fatal(err)
		}
		if encoded := base64.RawURLEncoding.EncodeToString(got); encoded != test.want {
			t.Errorf("%s: %s, want %s", test.algorithm, encoded, test.want)
		}
	}
	ec, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), b64("jpsQnnGQmL-YBIffH1136cspYG6-0iY7X1fCE9-E9LI"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := h.Import(ctx, "RFC 7515 A.3", ec, nil)
	if err != nil {
		t.Fatal(err)
	}
	input := []byte("eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ")
	published := b64("DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q")
	if err := verify(key, hsmkey.ES256, input, published); err != nil {
		t.Errorf("RFC 7515 A.3: %v", err)
	}
	signOnce(t, key)
}

func TestAKeyThatCannotBeUsedIsRefusedBeforeTheHSMIsTouched(t *testing.T) {
	injector := fault.New()
	h := wrapped(t, injector.Wrap)
	small, err := rsa.GenerateKey(rand.Reader, 1024) //nolint:gosec // too small on purpose
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	broken := *good
	broken.D = new(big.Int).Add(good.D, big.NewInt(2))
	_, foreign, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	foreign[40] ^= 1
	mixed := *as[*ecdsa.PrivateKey](newKeys(t)[hsmkey.P256])
	mixed.PublicKey = as[*ecdsa.PrivateKey](newKeys(t)[hsmkey.P256]).PublicKey
	for name, test := range map[string]struct {
		key   any
		label string
		want  error
	}{
		"RSA of 1024 bits":  {small, "key", hsmkey.ErrUnsupported},
		"P-224":             {p224, "key", hsmkey.ErrUnsupported},
		"a short secret":    {make([]byte, 31), "key", hsmkey.ErrUnsupported},
		"an empty secret":   {[]byte{}, "key", hsmkey.ErrUnsupported},
		"no key":            {nil, "key", hsmkey.ErrUnsupported},
		"a public key":      {good.Public(), "key", hsmkey.ErrUnsupported},
		"a nil RSA key":     {(*rsa.PrivateKey)(nil), "key", hsmkey.ErrInvalid},
		"an empty RSA key":  {&rsa.PrivateKey{}, "key", hsmkey.ErrInvalid},
		"a broken RSA key":  {&broken, "key", hsmkey.ErrInvalid},
		"a nil EC key":      {(*ecdsa.PrivateKey)(nil), "key", hsmkey.ErrInvalid},
		"an empty EC key":   {&ecdsa.PrivateKey{}, "key", hsmkey.ErrInvalid},
		"half an EC key":    {&ecdsa.PrivateKey{PublicKey: ecdsa.PublicKey{Curve: elliptic.P256()}}, "key", hsmkey.ErrInvalid},
		"a mixed EC key":    {&mixed, "key", hsmkey.ErrInvalid},
		"a mixed Ed25519":   {foreign, "key", hsmkey.ErrInvalid},
		"a short Ed25519":   {ed25519.PrivateKey(make([]byte, 32)), "key", hsmkey.ErrInvalid},
		"no label":          {good, "", hsmkey.ErrInvalid},
		"a blank label":     {good, "  ", hsmkey.ErrInvalid},
		"a padded label":    {good, "key ", hsmkey.ErrInvalid},
		"a label with a NL": {good, "a\nb", hsmkey.ErrInvalid},
		"a binary label":    {good, "a\xffb", hsmkey.ErrInvalid},
	} {
		if key, err := h.Import(context.Background(), test.label, test.key, nil); !errors.Is(err, test.want) || key != nil {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
	}
	if n := injector.Calls("C_OpenSession"); n != 0 {
		t.Errorf("%d sessions were opened", n)
	}
}

func TestAFailedImportLeavesNothingBehind(t *testing.T) {
	injector := fault.New()
	h := wrapped(t, injector.Wrap)
	before := objects(t, h)
	for _, code := range []uint{pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_TEMPLATE_INCONSISTENT, 0x80000001} {
		for typ, key := range newKeys(t) {
			// The public key is stored, the private one is not.
			injector.Clear()
			for nth := 2; nth <= 8; nth += 2 {
				injector.Fail("C_CreateObject", nth, code)
			}
			if _, err := h.Import(context.Background(), "key", key, nil); !errors.Is(err, pkcs11.Error(code)) {
				t.Errorf("%s: %v, want the code %v", typ, err, pkcs11.Error(code))
			}
			injector.Clear()
			if n := objects(t, h); n != before {
				t.Fatalf("%s, %v: %d objects are left", typ, pkcs11.Error(code), n-before)
			}
		}
	}
}

func TestAnImportIsNeverRepeated(t *testing.T) {
	injector := fault.New()
	h := wrapped(t, injector.Wrap)
	objects(t, h)
	injector.Fail("C_CreateObject", 1, pkcs11.CKR_DEVICE_ERROR)
	_, err := h.Import(context.Background(), "key", newKeys(t)[hsmkey.P256], nil)
	if !errors.Is(err, hsmkey.ErrSession) {
		t.Errorf("Import = %v, want ErrSession", err)
	}
	if n := injector.Calls("C_CreateObject"); n != 1 {
		t.Errorf("C_CreateObject was called %d times, want once", n)
	}
}

// picky takes points and curve names in one form only.
type picky struct {
	odd
	rawPoint, byName bool
}

func (o picky) CreateObject(h pkcs11.SessionHandle, template []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	template = slices.Clone(template)
	for i, a := range template {
		switch {
		case a.Type == pkcs11.CKA_EC_POINT && o.rawPoint:
			if a.Value[0] == 0x04 && int(a.Value[1]) == len(a.Value)-2 {
				return 0, pkcs11.Error(pkcs11.CKR_ATTRIBUTE_VALUE_INVALID)
			}
			template[i] = pkcs11.NewAttribute(a.Type, append([]byte{0x04, byte(len(a.Value))}, a.Value...))
		case a.Type == pkcs11.CKA_EC_PARAMS && o.byName:
			if a.Value[0] != 0x13 {
				return 0, pkcs11.Error(pkcs11.CKR_DOMAIN_PARAMS_INVALID)
			}
			template[i] = pkcs11.NewAttribute(a.Type, []byte{0x06, 0x03, 0x2b, 0x65, 0x70})
		}
	}
	return o.Module.CreateObject(h, template)
}

func (o picky) GenerateKeyPair(h pkcs11.SessionHandle, m []*pkcs11.Mechanism, public, private []*pkcs11.Attribute) (pkcs11.ObjectHandle, pkcs11.ObjectHandle, error) {
	public = slices.Clone(public)
	for i, a := range public {
		if a.Type == pkcs11.CKA_EC_PARAMS && o.byName {
			if a.Value[0] != 0x13 {
				return 0, 0, pkcs11.Error(pkcs11.CKR_DOMAIN_PARAMS_INVALID)
			}
			public[i] = pkcs11.NewAttribute(a.Type, []byte{0x06, 0x03, 0x2b, 0x65, 0x70})
		}
	}
	return o.Module.GenerateKeyPair(h, m, public, private)
}

func TestCurvesAndPointsAreWrittenAsTheModuleAcceptsThem(t *testing.T) {
	for _, wrap := range []picky{{rawPoint: true}, {byName: true}, {rawPoint: true, byName: true}} {
		h := wrapped(t, func(m sessionpool.Module) sessionpool.Module { wrap.Module = m; return wrap })
		key := newKeys(t)[hsmkey.Ed25519]
		if _, err := h.Import(context.Background(), "imported", key, nil); err != nil {
			t.Errorf("%+v: %v", wrap, err)
		}
		mustFind(t, h, hsmkey.Query{Label: "imported"})
		generate(t, h, "generated", hsmkey.Ed25519)
		mustFind(t, h, hsmkey.Query{Label: "generated"})
		if n := objects(t, h); n != 4 {
			t.Errorf("%+v: %d objects, want those of two key pairs", wrap, n)
		}
		if err := h.Close(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
}

// mangles stores another private key than it was given.
type mangles struct{ odd }

func (o mangles) CreateObject(h pkcs11.SessionHandle, template []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	template = slices.Clone(template)
	for i, a := range template {
		if a.Type == pkcs11.CKA_VALUE {
			value := slices.Clone(a.Value)
			value[len(value)-1] ^= 1
			template[i] = pkcs11.NewAttribute(a.Type, value)
		}
	}
	return o.Module.CreateObject(h, template)
}

func TestAKeyThatTheModuleMisreadIsNoticedAndRemoved(t *testing.T) {
	h := wrapped(t, func(m sessionpool.Module) sessionpool.Module { return mangles{odd{m}} })
	_, err := h.Import(context.Background(), "key", newKeys(t)[hsmkey.P256], nil)
	if !errors.Is(err, hsmkey.ErrUnsupported) || !strings.Contains(err.Error(), "signs wrongly") {
		t.Errorf("Import = %v, want ErrUnsupported that says so", err)
	}
	if n := objects(t, h); n != 0 {
		t.Errorf("%d objects are left", n)
	}
}

func TestAnImportedKeyCannotBeExtracted(t *testing.T) {
	h := newHSM(t)
	for typ, key := range newKeys(t) {
		if _, err := h.Import(context.Background(), string(typ), key, nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := h.Import(context.Background(), "secret", make([]byte, 32), nil); err != nil {
		t.Fatal(err)
	}
	allSensitive(t, h, 6)
}

func TestAGeneratedKeyCannotBeExtracted(t *testing.T) {
	h := newHSM(t)
	for _, typ := range []hsmkey.KeyType{hsmkey.RSA2048, hsmkey.P256, hsmkey.Ed25519, hsmkey.HMAC256} {
		generate(t, h, string(typ), typ)
	}
	allSensitive(t, h, 4)
}

// allSensitive checks every private and secret key on the token.
func allSensitive(tb testing.TB, h *hsmkey.HSM, want int) {
	tb.Helper()
	n := 0
	do(tb, h, func(m sessionpool.Module, session pkcs11.SessionHandle) error {
		for _, class := range []uint{pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_SECRET_KEY} {
			found, err := find(m, session, pkcs11.NewAttribute(pkcs11.CKA_CLASS, class))
			if err != nil {
				return err
			}
			for _, o := range found {
				n++
				got, err := m.GetAttributeValue(session, o, []*pkcs11.Attribute{
					pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil),
					pkcs11.NewAttribute(pkcs11.CKA_TOKEN, nil),
					pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, nil),
					pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, nil),
					pkcs11.NewAttribute(pkcs11.CKA_SIGN, nil),
					pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, nil),
				})
				if err != nil {
					return err
				}
				for i, want := range []byte{1, 1, 1, 1, 0} {
					if got[i+1].Value[0] != want {
						tb.Errorf("%q: attribute 0x%x is %d", got[0].Value, got[i+1].Type, got[i+1].Value[0])
					}
				}
				_, err = m.GetAttributeValue(session, o, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil)})
				if !errors.Is(err, pkcs11.Error(pkcs11.CKR_ATTRIBUTE_SENSITIVE)) && !errors.Is(err, pkcs11.Error(pkcs11.CKR_ATTRIBUTE_TYPE_INVALID)) {
					tb.Errorf("%q: its value reads %v", got[0].Value, err)
				}
			}
		}
		return nil
	})
	if n != want {
		tb.Errorf("%d keys, want %d", n, want)
	}
}

// typed ties HMAC to keys of the type of its hash, as some modules do.
type typed struct {
	odd
	refused *atomic.Int32
}

func (o typed) SignSingle(dst []byte, h pkcs11.SessionHandle, m *pkcs11.Mechanism, key pkcs11.ObjectHandle, data []byte, size int) ([]byte, error) {
	got, err := o.GetAttributeValue(h, key, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, nil)})
	if err != nil {
		return nil, err
	}
	if slices.Equal(got[0].Value, pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET).Value) {
		o.refused.Add(1)
		return nil, pkcs11.Error(pkcs11.CKR_KEY_TYPE_INCONSISTENT)
	}
	return o.Module.SignSingle(dst, h, m, key, data, size)
}

func TestASecretGetsTheTypeOfItsHashWhereTheModuleWantsIt(t *testing.T) {
	var refused atomic.Int32
	h := wrapped(t, func(m sessionpool.Module) sessionpool.Module { return typed{odd{m}, &refused} })
	key, err := h.Import(context.Background(), "secret", make([]byte, 64), nil)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(key.Algorithms(), []hsmkey.Algorithm{hsmkey.HS512}) {
		t.Errorf("signs %v, want HS512 only", key.Algorithms())
	}
	signOnce(t, key)
	if refused.Load() == 0 {
		t.Error("the test did not refuse anything")
	}
	if n := objects(t, h); n != 1 {
		t.Errorf("%d objects, want one", n)
	}
}

func TestALabelOrIDThatIsTakenIsRefusedBeforeAnythingIsMade(t *testing.T) {
	test := testhsm.New(t)
	injector := fault.New()
	c := config(test)
	c.Pool.Wrap = injector.Wrap
	h := open(t, c)
	made, err := h.Generate(context.Background(), "taken", hsmkey.P256, []byte{1})
	if err != nil {
		t.Fatal(err)
	}
	generate(t, h, "a secret", hsmkey.HMAC256)
	calls := injector.Calls("C_GenerateKeyPair") + injector.Calls("C_GenerateKey") + injector.Calls("C_CreateObject")
	for _, typ := range []hsmkey.KeyType{hsmkey.RSA2048, hsmkey.P256, hsmkey.HMAC256} {
		for label, id := range map[string][]byte{"taken": nil, "a secret": nil, "free": {1}} {
			if _, err := h.Generate(context.Background(), label, typ, id); !errors.Is(err, hsmkey.ErrExists) {
				t.Errorf("Generate(%q, %s, %x) = %v, want ErrExists", label, typ, id, err)
			}
		}
	}
	for typ, key := range newKeys(t) {
		if _, err := h.Import(context.Background(), "taken", key, nil); !errors.Is(err, hsmkey.ErrExists) {
			t.Errorf("Import of %s = %v, want ErrExists", typ, err)
		}
	}
	if now := injector.Calls("C_GenerateKeyPair") + injector.Calls("C_GenerateKey") + injector.Calls("C_CreateObject"); now != calls {
		t.Errorf("%d objects were begun", now-calls)
	}
	signOnce(t, made)
}
