package jws_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/asn1"
	"errors"
	"io"
	"math/big"
	"strings"
	"sync"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jwk"
	"github.com/hsmkey/hsmkey/jws"
)

// softwareKeys has one private key of each kind, made once.
var softwareKeys = sync.OnceValue(func() []crypto.Signer {
	rsaKey, _ := rsa.GenerateKey(rand.Reader, 2048)
	p256, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	p521, _ := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	return []crypto.Signer{rsaKey, p256, p384, p521, ed}
})

func softwareKey[K crypto.Signer]() K {
	for _, key := range softwareKeys() {
		if k, ok := key.(K); ok {
			return k
		}
	}
	panic("no software key of this type")
}

func fromSigner(t *testing.T, key crypto.Signer, opts jws.Options) *jws.Signer {
	t.Helper()
	signer, err := jws.FromSigner(key, opts)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

func algorithmsOf(t *testing.T, pub crypto.PublicKey) []hsmkey.Algorithm {
	t.Helper()
	key, err := jwk.FromPublic(pub, jwk.WithAlgorithm(""))
	if err != nil {
		t.Fatal(err)
	}
	return key.Algorithms()
}

func TestAnySignerCanSign(t *testing.T) {
	count := 0
	for _, key := range softwareKeys() {
		for _, alg := range algorithmsOf(t, key.Public()) {
			t.Run(string(alg), func(t *testing.T) {
				signer := fromSigner(t, key, jws.Options{Algorithm: alg})
				if want, _ := jwk.Thumbprint(key.Public()); signer.KeyID() != want {
					t.Errorf("kid %q, want the thumbprint %q", signer.KeyID(), want)
				}
				// ECDSA numbers are now and then shorter than the curve, about one
				// in 128 signatures: enough of them to meet one.
				rounds := 1
				if strings.HasPrefix(string(alg), "ES") {
					rounds = 300
				}
				for range rounds {
					token := sign(t, signer, "{}")
					object, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.SignatureAlgorithm(alg)})
					if err != nil {
						t.Fatal(err)
					}
					if _, err := object.Verify(key.Public()); err != nil {
						t.Fatalf("%s does not verify: %v", token, err)
					}
				}
			})
			count++
		}
	}
	if count != 10 {
		t.Errorf("%d algorithms, want the ten that need no secret", count)
	}
}

// stubborn is a crypto.Signer that notes what it is asked for and answers as told.
type stubborn struct {
	crypto.Signer
	opts   crypto.SignerOpts
	length int // of what was to be signed
	answer func([]byte) ([]byte, error)
}

func (s *stubborn) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	s.opts, s.length = opts, len(digest)
	signature, err := s.Signer.Sign(random, digest, opts)
	if err != nil || s.answer == nil {
		return signature, err
	}
	return s.answer(signature)
}

func TestASignerIsAskedForASaltAsLongAsTheHash(t *testing.T) {
	for alg, hash := range map[hsmkey.Algorithm]crypto.Hash{
		hsmkey.PS256: crypto.SHA256, hsmkey.PS384: crypto.SHA384, hsmkey.PS512: crypto.SHA512,
	} {
		key := &stubborn{Signer: softwareKey[*rsa.PrivateKey]()}
		token := sign(t, fromSigner(t, key, jws.Options{Algorithm: alg}), "{}")
		opts, ok := key.opts.(*rsa.PSSOptions)
		if !ok || opts.SaltLength != rsa.PSSSaltLengthEqualsHash || opts.Hash != hash || key.length != hash.Size() {
			t.Errorf("%s: asked for %+v over %d bytes", alg, key.opts, key.length)
		}
		if err := verifyPSS(key.Public(), hash, token); err != nil {
			t.Errorf("%s: %v", alg, err)
		}
	}
}

func TestASignerThatMisbehavesMakesNoToken(t *testing.T) {
	der := func(r, s *big.Int) []byte {
		out, _ := asn1.Marshal(struct{ R, S *big.Int }{r, s})
		return out
	}
	one, order := big.NewInt(1), elliptic.P256().Params().N
	broken := errors.New("broken")
	for name, answer := range map[string][]byte{
		"an empty signature": {},
		"no DER":             []byte("signature"),
		"DER of one number":  {0x30, 3, 2, 1, 1},
		"trailing bytes":     append(der(one, one), 0),
		"r is 0":             der(new(big.Int), one),
		"s is 0":             der(one, new(big.Int)),
		"r is negative":      der(big.NewInt(-1), one),
		"r is the order":     der(order, one),
		"s is huge":          der(one, new(big.Int).Lsh(one, 300)),
	} {
		t.Run(name, func(t *testing.T) {
			key := &stubborn{Signer: softwareKey[*ecdsa.PrivateKey](), answer: func([]byte) ([]byte, error) { return answer, nil }}
			if token, err := fromSigner(t, key, jws.Options{}).Sign(context.Background(), nil); err == nil || token != "" {
				t.Errorf("Sign = %q, %v, want an error", token, err)
			}
		})
	}
	for name, private := range map[string]crypto.Signer{"RSA": softwareKey[*rsa.PrivateKey](), "Ed25519": softwareKey[ed25519.PrivateKey]()} {
		short := &stubborn{Signer: private, answer: func(sig []byte) ([]byte, error) { return sig[1:], nil }}
		if _, err := fromSigner(t, short, jws.Options{}).Sign(context.Background(), nil); err == nil || !strings.Contains(err.Error(), "bytes") {
			t.Errorf("a short %s signature: %v, want an error about its length", name, err)
		}
		failing := &stubborn{Signer: private, answer: func([]byte) ([]byte, error) { return nil, broken }}
		if _, err := fromSigner(t, failing, jws.Options{}).Sign(context.Background(), nil); !errors.Is(err, broken) {
			t.Errorf("a failing %s signer: %v, want its own error", name, err)
		}
	}
}

// other is a crypto.Signer with a public key of choice.
type other struct {
	crypto.Signer
	pub crypto.PublicKey
}

func (o other) Public() crypto.PublicKey { return o.pub }

func TestSignersThatJOSECannotUseAreRefused(t *testing.T) {
	short, _ := rsa.GenerateKey(rand.Reader, 1024)
	p224, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	for name, key := range map[string]crypto.Signer{
		"a short RSA key": short, "P-224": p224, "no public key": other{}, "a string": other{pub: "key"},
	} {
		if _, err := jws.FromSigner(key, jws.Options{}); !errors.Is(err, hsmkey.ErrUnsupported) {
			t.Errorf("%s: %v, want ErrUnsupported", name, err)
		}
	}
	if _, err := jws.FromSigner(softwareKey[*ecdsa.PrivateKey](), jws.Options{Algorithm: hsmkey.RS256}); !errors.Is(err, hsmkey.ErrUnsupported) {
		t.Errorf("RS256 with an EC key: %v, want ErrUnsupported", err)
	}
	if _, err := jws.FromSigner(nil, jws.Options{}); !errors.Is(err, hsmkey.ErrConfig) {
		t.Errorf("no signer: %v, want ErrConfig", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	key := &stubborn{Signer: softwareKey[*rsa.PrivateKey]()}
	if _, err := fromSigner(t, key, jws.Options{}).Sign(ctx, nil); !errors.Is(err, context.Canceled) || key.opts != nil {
		t.Errorf("a canceled context: %v, want context.Canceled and no call", err)
	}
}

func TestFromSignerTakesAKeyOnTheHSM(t *testing.T) {
	key := generate(t, openHSM(t), hsmkey.HMAC256)
	if _, err := jws.FromSigner(key, jws.Options{}); err != nil {
		t.Errorf("an HMAC key: %v", err)
	}
	if _, err := jws.FromSigner((*hsmkey.HSMJWK)(nil), jws.Options{}); !errors.Is(err, hsmkey.ErrConfig) {
		t.Errorf("a nil key: %v, want ErrConfig", err)
	}
}
