package jwk_test

import (
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math/big"
	"strings"
	"sync"
	"testing"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jwk"
)

// ed25519JWK is the public key of RFC 8037, appendix A.2.
const ed25519JWK = `{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}`

// rsaJWK is the key of RFC 7638, section 3.1.
const rsaJWK = `{"kty":"RSA","n":"0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw","e":"AQAB","alg":"RS256","kid":"2011-04-29"}`

// privateKeys has one private key of each kind, made once.
var privateKeys = sync.OnceValue(func() map[string]crypto.Signer {
	keys := make(map[string]crypto.Signer)
	keys["rsa"], _ = rsa.GenerateKey(rand.Reader, 2048)
	keys["p256"], _ = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	keys["p384"], _ = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	keys["p521"], _ = ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	_, keys["ed25519"], _ = ed25519.GenerateKey(rand.Reader)
	return keys
})

func fromPublic(t *testing.T, pub crypto.PublicKey, opts ...jwk.Option) jwk.Key {
	t.Helper()
	key, err := jwk.FromPublic(pub, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func marshal(t *testing.T, v any) string {
	t.Helper()
	out, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func unmarshal(t *testing.T, text string) jwk.Key {
	t.Helper()
	var key jwk.Key
	if err := json.Unmarshal([]byte(text), &key); err != nil {
		t.Fatal(err)
	}
	return key
}

func TestTheThumbprintsAreThoseOfTheStandards(t *testing.T) {
	for name, test := range map[string]struct{ jwk, want string }{
		"RFC 7638, section 3.1":  {rsaJWK, "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"},
		"RFC 8037, appendix A.3": {ed25519JWK, "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := jwk.Thumbprint(unmarshal(t, test.jwk).PublicKey())
			if err != nil || got != test.want {
				t.Errorf("Thumbprint = %q, %v, want %q", got, err, test.want)
			}
		})
	}
}

func TestAPublicKeyBecomesAJWKForVerifyingSignatures(t *testing.T) {
	pub := unmarshal(t, ed25519JWK).PublicKey()
	const want = `{"use":"sig","kty":"OKP","kid":"kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k","crv":"Ed25519","alg":"EdDSA","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo","key_ops":["verify"]}`
	if got := marshal(t, fromPublic(t, pub)); got != want {
		t.Errorf("JWK = %s\nwant  %s", got, want)
	}
}

func TestTheDefaultAlgorithmFollowsTheKey(t *testing.T) {
	want := map[string]hsmkey.Algorithm{
		"rsa": hsmkey.RS256, "p256": hsmkey.ES256, "p384": hsmkey.ES384, "p521": hsmkey.ES512, "ed25519": hsmkey.EdDSA,
	}
	for name, key := range privateKeys() {
		if got := fromPublic(t, key.Public()).Algorithm(); got != want[name] {
			t.Errorf("%s: algorithm %s, want %s", name, got, want[name])
		}
	}
}

func TestKidAndAlgorithmCanBeChosen(t *testing.T) {
	pub := privateKeys()["rsa"].Public()
	key := fromPublic(t, pub, jwk.WithKeyID("2026-1"), jwk.WithAlgorithm(hsmkey.PS384))
	if key.KeyID() != "2026-1" || key.Algorithm() != hsmkey.PS384 {
		t.Errorf("kid %q, alg %q", key.KeyID(), key.Algorithm())
	}
	bare := marshal(t, fromPublic(t, pub, jwk.WithKeyID(""), jwk.WithAlgorithm("")))
	if strings.Contains(bare, `"kid"`) || strings.Contains(bare, `"alg"`) {
		t.Errorf("JWK without kid and alg = %s", bare)
	}
	for _, alg := range []hsmkey.Algorithm{hsmkey.ES256, hsmkey.HS256, "none", "RSA-OAEP"} {
		if _, err := jwk.FromPublic(pub, jwk.WithAlgorithm(alg)); !errors.Is(err, hsmkey.ErrUnsupported) {
			t.Errorf("an RSA key with %s: %v, want ErrUnsupported", alg, err)
		}
	}
}

func TestPrivateKeysAreRefusedAndNeverShown(t *testing.T) {
	mistakes := map[string]any{
		"secret": []byte("0123456789abcdef0123456789abcdef"),
		"HSM":    &hsmkey.HSMJWK{},
	}
	for name, key := range privateKeys() {
		mistakes[name] = key
	}
	mistakes["ecdh"], _ = ecdh.P256().GenerateKey(rand.Reader)
	for name, key := range mistakes {
		t.Run(name, func(t *testing.T) {
			_, err := jwk.FromPublic(key)
			if !errors.Is(err, jwk.ErrPrivate) {
				t.Fatalf("FromPublic = %v, want ErrPrivate", err)
			}
			if _, err := jwk.Thumbprint(key); !errors.Is(err, jwk.ErrPrivate) {
				t.Errorf("Thumbprint = %v, want ErrPrivate", err)
			}
			if len(err.Error()) > 100 {
				t.Errorf("the error says too much: %v", err)
			}
		})
	}
}

func TestAPrivateJWKIsRefusedAloneAndInASet(t *testing.T) {
	keys := map[string]any{"secret": []byte("0123456789abcdef0123456789abcdef")}
	for name, key := range privateKeys() {
		keys[name] = key
	}
	for name, key := range keys {
		t.Run(name, func(t *testing.T) {
			private := marshal(t, jose.JSONWebKey{Key: key, KeyID: "k"})
			refused(t, private)
		})
	}
	// Each private member alone, which go-jose reads as part of a public key.
	for _, member := range []string{"d", "p", "q", "dp", "dq", "qi", "k", "priv"} {
		refused(t, strings.TrimSuffix(rsaJWK, "}")+`,"`+member+`":"AQAB"}`)
	}
	refused(t, strings.TrimSuffix(rsaJWK, "}")+`,"oth":[{"r":"AQ"}]}`)
	refused(t, `{"kty":"unheard-of","d":"AQAB"}`)
}

func refused(t *testing.T, private string) {
	t.Helper()
	var key jwk.Key
	if err := json.Unmarshal([]byte(private), &key); !errors.Is(err, jwk.ErrPrivate) {
		t.Errorf("a private JWK is read: %v, want ErrPrivate", err)
	}
	if got := key.PublicKey(); got != nil {
		t.Errorf("the refused JWK left a %T", got)
	}
	for _, text := range []string{private, `{"keys":[` + ed25519JWK + `,` + private + `]}`} {
		set, err := jwk.ParseSet([]byte(text))
		if !errors.Is(err, jwk.ErrPrivate) || len(set.Keys()) != 0 {
			t.Errorf("ParseSet = %d keys, %v, want ErrPrivate", len(set.Keys()), err)
		}
	}
}

func TestKeysThatJOSECannotUseAreRefused(t *testing.T) {
	p224, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	p256, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	p256.Curve = elliptic.P384()
	short, _ := rsa.GenerateKey(rand.Reader, 1024)
	x25519, _ := ecdh.X25519().GenerateKey(rand.Reader)
	for name, pub := range map[string]crypto.PublicKey{
		"nothing":             nil,
		"a nil RSA key":       (*rsa.PublicKey)(nil),
		"an empty RSA key":    &rsa.PublicKey{},
		"a short RSA key":     short.Public(),
		"a nil EC key":        (*ecdsa.PublicKey)(nil),
		"an empty EC key":     &ecdsa.PublicKey{},
		"a point off a curve": &p256.PublicKey,
		"P-224":               p224.Public(),
		"a short Ed25519 key": ed25519.PublicKey("short"),
		"the Ed25519 point 0": ed25519.PublicKey(make([]byte, 32)),
		"X25519":              x25519.Public(),
		"a string":            "key",
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := jwk.FromPublic(pub); !errors.Is(err, hsmkey.ErrUnsupported) {
				t.Errorf("FromPublic = %v, want ErrUnsupported", err)
			}
		})
	}
	if out, err := json.Marshal(jwk.Key{}); !errors.Is(err, hsmkey.ErrUnsupported) {
		t.Errorf("the zero Key is marshaled: %s, %v", out, err)
	}
	if _, err := jwk.Public(nil); !errors.Is(err, hsmkey.ErrConfig) {
		t.Errorf("Public(nil) = %v, want ErrConfig", err)
	}
	if _, err := jwk.KeyID(nil); !errors.Is(err, hsmkey.ErrConfig) {
		t.Errorf("KeyID(nil) = %v, want ErrConfig", err)
	}
}

func TestAJWKIsReadAsItWasWritten(t *testing.T) {
	for name, key := range privateKeys() {
		t.Run(name, func(t *testing.T) {
			written := marshal(t, fromPublic(t, key.Public()))
			read := unmarshal(t, written)
			if got := marshal(t, read); got != written {
				t.Errorf("read and written again: %s\nwant %s", got, written)
			}
			var other jose.JSONWebKey
			if err := json.Unmarshal([]byte(written), &other); err != nil {
				t.Fatalf("go-jose: %v", err)
			}
			if pub, ok := other.Key.(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(key.Public()) {
				t.Errorf("go-jose reads another key")
			}
		})
	}
}

func TestAlgorithmsObeyWhatTheJWKSays(t *testing.T) {
	all := []hsmkey.Algorithm{hsmkey.RS256, hsmkey.RS384, hsmkey.RS512, hsmkey.PS256, hsmkey.PS384, hsmkey.PS512}
	bare := strings.Replace(rsaJWK, `,"alg":"RS256"`, "", 1)
	with := func(members string) string { return strings.TrimSuffix(bare, "}") + members + "}" }
	for text, want := range map[string][]hsmkey.Algorithm{
		bare: all,
		with(`,"use":"sig","key_ops":["verify"]`): all,
		with(`,"alg":"PS256"`):                    {hsmkey.PS256},
		with(`,"alg":"ES256"`):                    nil,
		with(`,"alg":"RSA-OAEP"`):                 nil,
		with(`,"use":"enc"`):                      nil,
		with(`,"key_ops":["encrypt"]`):            nil,
		with(`,"key_ops":["sign","verify"]`):      all,
		ed25519JWK:                                {hsmkey.EdDSA},
	} {
		if diff := cmp.Diff(want, unmarshal(t, text).Algorithms()); diff != "" {
			t.Errorf("%s: %s", text[len(text)-60:], diff)
		}
	}
	if got := (jwk.Key{}).Algorithms(); got != nil {
		t.Errorf("the zero Key verifies %v", got)
	}
}

func TestWhatIsNoJWKIsRefused(t *testing.T) {
	for text, want := range map[string]error{
		`[]`:            hsmkey.ErrConfig,
		`"key"`:         hsmkey.ErrConfig,
		`null`:          hsmkey.ErrConfig,
		`{}`:            hsmkey.ErrConfig,
		`{"kty":1}`:     hsmkey.ErrConfig,
		`{"kty":"RSA"}`: hsmkey.ErrConfig,
		`{"kty":"EC","crv":"P-256","x":"AQ","y":"AQ"}`:                                  hsmkey.ErrConfig,
		`{"kty":"OKP","crv":"X25519","x":"AQ"}`:                                         hsmkey.ErrUnsupported,
		`{"kty":"unheard-of"}`:                                                          hsmkey.ErrUnsupported,
		strings.TrimSuffix(ed25519JWK, "}") + `,"key_ops":"verify"}`:                    hsmkey.ErrConfig,
		strings.TrimSuffix(ed25519JWK, "}") + `,"x":"` + strings.Repeat("A", 43) + `"}`: hsmkey.ErrConfig, // twice
		`{"kty":"RSA","e":"AQAB","n":"` + base64.RawURLEncoding.EncodeToString(big.NewInt(0).Lsh(big.NewInt(3), 1000).Bytes()) + `"}`: hsmkey.ErrUnsupported, // 1002 bits
	} {
		var key jwk.Key
		if err := key.UnmarshalJSON([]byte(text)); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", text, err, want)
		}
	}
}
