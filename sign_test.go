package hsmkey_test

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"slices"
	"strings"
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

func TestAKeySignsOnlyByItsOwnAlgorithms(t *testing.T) {
	injector := fault.New()
	h := wrapped(t, injector.Wrap)
	all := []hsmkey.Algorithm{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "HS256", "HS384", "HS512", "none", "", "ES256K", "rs256"}
	for typ, own := range map[hsmkey.KeyType][]hsmkey.Algorithm{
		hsmkey.RSA2048: {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"},
		hsmkey.P256:    {"ES256"},
		hsmkey.P384:    {"ES384"},
		hsmkey.P521:    {"ES512"},
		hsmkey.Ed25519: {"EdDSA"},
		hsmkey.HMAC256: {"HS256"},
		hsmkey.HMAC384: {"HS384", "HS256"},
		hsmkey.HMAC512: {"HS512", "HS384", "HS256"},
	} {
		key := generate(t, h, string(typ), typ)
		if !slices.Equal(key.Algorithms(), own) {
			t.Errorf("%s signs %v, want %v", typ, key.Algorithms(), own)
		}
		before := injector.Calls("C_SignInit")
		for _, algorithm := range all {
			if slices.Contains(own, algorithm) {
				continue
			}
			_, err := key.SignJWS(context.Background(), algorithm, []byte("a.b"))
			if !errors.Is(err, hsmkey.ErrUnsupported) || !strings.Contains(err.Error(), string(typ)) {
				t.Errorf("%s by %q: %v, want ErrUnsupported", typ, algorithm, err)
			}
		}
		if n := injector.Calls("C_SignInit"); n != before {
			t.Errorf("%s: the HSM was asked %d times", typ, n-before)
		}
	}
}

func TestAnRSAKeyTooShortForJOSESignsOnlyElsewhere(t *testing.T) {
	test := testhsm.New(t)
	testhsm.PKCS11Tool(t, test, "--keypairgen", "--key-type", "rsa:1024", "--label", "short", "--id", "01")
	key, err := open(t, config(test)).Key(context.Background(), hsmkey.Query{Label: "short"})
	if err != nil {
		t.Fatal(err)
	}
	if key.Type() != "rsa:1024" || len(key.Algorithms()) != 0 {
		t.Errorf("%s signs %v", key.Type(), key.Algorithms())
	}
	if _, err := key.SignJWS(context.Background(), hsmkey.RS256, nil); !errors.Is(err, hsmkey.ErrUnsupported) || !strings.Contains(err.Error(), "2048") {
		t.Errorf("SignJWS = %v, want ErrUnsupported", err)
	}
	digest := make([]byte, 32)
	if _, err := key.Sign(nil, digest, crypto.SHA256); err != nil {
		t.Errorf("Sign = %v", err)
	}
}

func TestMessagesOfEveryLengthAreSigned(t *testing.T) {
	h := newHSM(t)
	for _, typ := range []hsmkey.KeyType{hsmkey.RSA2048, hsmkey.P256, hsmkey.Ed25519, hsmkey.HMAC256} {
		key := generate(t, h, string(typ), typ)
		for _, message := range [][]byte{nil, {}, {0}, bytes.Repeat([]byte("long"), 1<<18)} {
			algorithm := key.Algorithms()[0]
			signature, err := key.SignJWS(context.Background(), algorithm, message)
			if err != nil {
				t.Errorf("%s, %d bytes: %v", typ, len(message), err)
			} else if err := verify(key, algorithm, message, signature); err != nil {
				t.Errorf("%s, %d bytes: %v", typ, len(message), err)
			}
		}
	}
}

// Each case is a module that lacks the raw mechanism, or all of them.
func TestAModuleWithoutTheRawMechanismSignsByTheCombinedOne(t *testing.T) {
	for _, test := range []struct {
		typ        hsmkey.KeyType
		algorithms []hsmkey.Algorithm
		raw        uint
		combined   []uint
	}{
		{hsmkey.RSA2048, []hsmkey.Algorithm{"RS256", "RS384", "RS512"}, pkcs11.CKM_RSA_PKCS,
			[]uint{pkcs11.CKM_SHA256_RSA_PKCS, pkcs11.CKM_SHA384_RSA_PKCS, pkcs11.CKM_SHA512_RSA_PKCS}},
		{hsmkey.RSA2048, []hsmkey.Algorithm{"PS256", "PS384", "PS512"}, pkcs11.CKM_RSA_PKCS_PSS,
			[]uint{pkcs11.CKM_SHA256_RSA_PKCS_PSS, pkcs11.CKM_SHA384_RSA_PKCS_PSS, pkcs11.CKM_SHA512_RSA_PKCS_PSS}},
	} {
		for name, module := range map[string]lacks{
			"and does not list it":        {code: pkcs11.CKR_MECHANISM_INVALID},
			"although it lists it":        {code: pkcs11.CKR_MECHANISM_INVALID, listed: true},
			"which fails":                 {code: pkcs11.CKR_FUNCTION_FAILED, listed: true},
			"which fails in a vendor way": {code: 0x80000123, listed: true},
		} {
			t.Run(fmt.Sprintf("%v %s", test.algorithms, name), func(t *testing.T) {
				var refused atomic.Int32
				module.refused, module.mechanisms = &refused, []uint{test.raw}
				h := wrapped(t, func(m sessionpool.Module) sessionpool.Module { module.Module = m; return module })
				key := generate(t, h, "key", test.typ)
				for _, algorithm := range test.algorithms {
					refused.Store(0)
					for range 3 {
						signature, err := key.SignJWS(context.Background(), algorithm, []byte("a.b"))
						if err != nil {
							t.Fatal(err)
						}
						if err := verify(key, algorithm, []byte("a.b"), signature); err != nil {
							t.Error(err)
						}
					}
					// What worked is remembered: the raw mechanism is not tried again.
					most := int32(1)
					if !module.listed {
						most = 0
					} else if module.code == pkcs11.CKR_FUNCTION_FAILED {
						most = 2 // a failure that may be the session's is tried twice
					}
					if n := refused.Load(); n > most {
						t.Errorf("%s: %d attempts by the raw mechanism, want %d at most", algorithm, n, most)
					}
				}
			})
		}
		t.Run(fmt.Sprintf("%v not at all", test.algorithms), func(t *testing.T) {
			var refused atomic.Int32
			module := lacks{code: pkcs11.CKR_MECHANISM_INVALID, refused: &refused, mechanisms: append(test.combined, test.raw)}
			h := wrapped(t, func(m sessionpool.Module) sessionpool.Module { module.Module = m; return module })
			key := generate(t, h, "key", test.typ)
			_, err := key.SignJWS(context.Background(), test.algorithms[0], []byte("a.b"))
			if !errors.Is(err, hsmkey.ErrUnsupported) || !errors.Is(err, pkcs11.Error(pkcs11.CKR_MECHANISM_INVALID)) {
				t.Errorf("SignJWS = %v, want ErrUnsupported with the code", err)
			}
			for _, want := range []string{"RSA_PKCS", testhsm.DefaultLabel} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error does not name %s: %v", want, err)
				}
			}
		})
	}
}

// hashing is a module that has CKM_ECDSA_SHA256 and its like, and not
// CKM_ECDSA, which is the other way round in SoftHSM2.
type hashing struct{ odd }

var ecdsaHashes = map[uint]crypto.Hash{
	pkcs11.CKM_ECDSA_SHA256: crypto.SHA256, pkcs11.CKM_ECDSA_SHA384: crypto.SHA384, pkcs11.CKM_ECDSA_SHA512: crypto.SHA512,
}

func (o hashing) GetMechanismList(slot uint) ([]*pkcs11.Mechanism, error) {
	list, err := o.Module.GetMechanismList(slot)
	list = slices.DeleteFunc(list, func(m *pkcs11.Mechanism) bool { return m.Mechanism == pkcs11.CKM_ECDSA })
	for mechanism := range ecdsaHashes {
		list = append(list, pkcs11.NewMechanism(mechanism, nil))
	}
	return list, err
}

func (o hashing) SignSingle(dst []byte, h pkcs11.SessionHandle, m *pkcs11.Mechanism, key pkcs11.ObjectHandle, data []byte, size int) ([]byte, error) {
	hash, ok := ecdsaHashes[m.Mechanism]
	if !ok {
		return nil, pkcs11.Error(pkcs11.CKR_MECHANISM_INVALID)
	}
	digest := hash.New()
	digest.Write(data)
	return o.Module.SignSingle(dst, h, pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil), key, digest.Sum(nil), size)
}

func TestAModuleWithoutECDSAOfHashesSignsMessages(t *testing.T) {
	h := wrapped(t, func(m sessionpool.Module) sessionpool.Module { return hashing{odd{m}} })
	for _, typ := range []hsmkey.KeyType{hsmkey.P256, hsmkey.P384, hsmkey.P521} {
		key := generate(t, h, string(typ), typ)
		signOnce(t, key)
		if _, err := key.Sign(nil, make([]byte, 32), crypto.SHA256); !errors.Is(err, hsmkey.ErrUnsupported) {
			t.Errorf("%s: signing a digest: %v, want ErrUnsupported", typ, err)
		}
		signature, err := key.SignMessage(nil, []byte("message"), crypto.SHA384)
		if err != nil {
			t.Errorf("%s: %v", typ, err)
		} else if !verifyASN1(key, crypto.SHA384, []byte("message"), signature) {
			t.Errorf("%s: the signature is wrong", typ)
		}
	}
}

// short refuses digests that are longer than the key.
type short struct{ odd }

func (o short) SignSingle(dst []byte, h pkcs11.SessionHandle, m *pkcs11.Mechanism, key pkcs11.ObjectHandle, data []byte, size int) ([]byte, error) {
	if m.Mechanism == pkcs11.CKM_ECDSA && len(data) > size/2 {
		return nil, pkcs11.Error(pkcs11.CKR_DATA_LEN_RANGE)
	}
	return o.Module.SignSingle(dst, h, m, key, data, size)
}

func TestADigestLongerThanTheKeyIsCutToIt(t *testing.T) {
	h := wrapped(t, func(m sessionpool.Module) sessionpool.Module { return short{odd{m}} })
	key := generate(t, h, "key", hsmkey.P256)
	for _, hash := range []crypto.Hash{crypto.SHA384, crypto.SHA512} {
		signature, err := key.SignMessage(nil, []byte("message"), hash)
		if err != nil {
			t.Errorf("%v: %v", hash, err)
		} else if !verifyASN1(key, hash, []byte("message"), signature) {
			t.Errorf("%v: the signature is wrong", hash)
		}
	}
}

func TestAnHonestModuleGetsOneCallForEachSignature(t *testing.T) {
	injector := fault.New()
	h := wrapped(t, injector.Wrap)
	generate(t, h, "key", hsmkey.P256)
	key, err := h.Key(context.Background(), hsmkey.Query{Label: "key"})
	if err != nil {
		t.Fatal(err)
	}
	finds, inits := injector.Calls("C_FindObjectsInit"), injector.Calls("C_SignInit")
	for range 10 {
		signOnce(t, key)
	}
	if n := injector.Calls("C_SignInit") - inits; n != 10 {
		t.Errorf("%d signatures were begun, want 10", n)
	}
	if n := injector.Calls("C_FindObjectsInit") - finds; n != 0 {
		t.Errorf("the key was looked up again: %d searches", n)
	}
}

func TestManyGoroutinesSignWithOneKey(t *testing.T) {
	h := newHSM(t)
	var keys []*hsmkey.HSMJWK
	for _, typ := range []hsmkey.KeyType{hsmkey.RSA2048, hsmkey.P256, hsmkey.Ed25519, hsmkey.HMAC256} {
		keys = append(keys, generate(t, h, string(typ), typ))
	}
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			key := keys[i%len(keys)]
			for n := range 10 {
				input := fmt.Appendf(nil, "%d.%d", i, n)
				algorithm := key.Algorithms()[n%len(key.Algorithms())]
				signature, err := key.SignJWS(context.Background(), algorithm, input)
				if err != nil {
					t.Error(err)
				} else if err := verify(key, algorithm, input, signature); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestASignatureSurvivesLostSessionsLoginsAndHandles(t *testing.T) {
	injector := fault.New()
	h := wrapped(t, injector.Wrap)
	key := generate(t, h, "key", hsmkey.P256)
	for name, lose := range map[string]func(){
		"sessions closed":    injector.CloseSessions,
		"login lost":         injector.LoseLogin,
		"stale handle":       func() { injector.Fail("C_SignInit", 1, pkcs11.CKR_KEY_HANDLE_INVALID) },
		"stale object":       func() { injector.Fail("C_SignInit", 1, pkcs11.CKR_OBJECT_HANDLE_INVALID) },
		"not logged in":      func() { injector.Fail("C_SignInit", 1, pkcs11.CKR_USER_NOT_LOGGED_IN) },
		"sign fails":         func() { injector.Fail("C_Sign", 1, pkcs11.CKR_FUNCTION_FAILED) },
		"device error":       func() { injector.Fail("C_Sign", 1, pkcs11.CKR_DEVICE_ERROR) },
		"operation active":   func() { injector.Fail("C_SignInit", 1, pkcs11.CKR_OPERATION_ACTIVE) },
		"out of host memory": func() { injector.Fail("C_SignInit", 1, pkcs11.CKR_HOST_MEMORY) },
	} {
		for range 3 {
			lose()
			t.Run(name, func(t *testing.T) { signOnce(t, key) })
		}
	}
}

func TestAKeyThatIsReplacedUnderTheSameNameIsNeverUsed(t *testing.T) {
	for _, typ := range []hsmkey.KeyType{hsmkey.RSA2048, hsmkey.P256, hsmkey.Ed25519, hsmkey.HMAC256} {
		t.Run(string(typ), func(t *testing.T) {
			h := newHSM(t)
			ctx := context.Background()
			key, err := h.Generate(ctx, "key", typ, []byte{1})
			if err != nil {
				t.Fatal(err)
			}
			signOnce(t, key)
			if err := h.Delete(ctx, hsmkey.Query{Label: "key"}); err != nil {
				t.Fatal(err)
			}
			if _, err := h.Generate(ctx, "key", typ, []byte{1}); err != nil {
				t.Fatal(err)
			}
			_, err = key.SignJWS(ctx, key.Algorithms()[0], []byte("a.b"))
			if !errors.Is(err, hsmkey.ErrKeyMismatch) || !strings.Contains(err.Error(), testhsm.DefaultLabel) {
				t.Errorf("SignJWS = %v, want ErrKeyMismatch that names the token", err)
			}
			mustFind(t, h, hsmkey.Query{Label: "key"})
		})
	}
}

func TestAPinnedKeySignsInItsSessionOnly(t *testing.T) {
	injector := fault.New()
	h := wrapped(t, injector.Wrap)
	key := generate(t, h, "key", hsmkey.P256)
	s, err := h.Source().Acquire(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Release()
	opened := injector.Calls("C_OpenSession")
	pinned := key.In(s)
	for range 5 {
		signOnce(t, pinned)
	}
	if n := injector.Calls("C_OpenSession"); n != opened {
		t.Errorf("%d more sessions were opened", n-opened)
	}
	injector.Fail("C_Sign", 1, pkcs11.CKR_DEVICE_ERROR)
	if _, err := pinned.SignJWS(context.Background(), hsmkey.ES256, nil); !errors.Is(err, hsmkey.ErrSession) {
		t.Errorf("SignJWS in a session that fails = %v, want ErrSession", err)
	}
	s.Release()
	if _, err := pinned.SignJWS(context.Background(), hsmkey.ES256, nil); !errors.Is(err, hsmkey.ErrClosed) {
		t.Errorf("SignJWS in a released session = %v, want ErrClosed", err)
	}
	signOnce(t, key)
}

func TestASignatureEndsWithItsContext(t *testing.T) {
	injector := fault.New()
	h := wrapped(t, injector.Wrap)
	key := generate(t, h, "key", hsmkey.P256)
	signOnce(t, key)

	reached, release := injector.Hang("C_SignInit")
	defer release()
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		<-reached
		cancel()
	}()
	if _, err := key.WithContext(ctx).Sign(nil, make([]byte, 32), crypto.SHA256); !errors.Is(err, context.Canceled) {
		t.Errorf("Sign = %v, want context.Canceled", err)
	}
	if _, err := key.SignJWS(ctx, hsmkey.ES256, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("SignJWS = %v, want context.Canceled", err)
	}
	signOnce(t, key) // on another session, while that call still hangs
	release()
}

// reads tells what it was given to sign.
type reads struct {
	odd
	signed chan string
}

func (o reads) SignSingle(dst []byte, h pkcs11.SessionHandle, m *pkcs11.Mechanism, key pkcs11.ObjectHandle, data []byte, size int) ([]byte, error) {
	o.signed <- string(data)
	return o.Module.SignSingle(dst, h, m, key, data, size)
}

func TestAHangBecomesATimeoutAndLeavesTheCallersBufferAlone(t *testing.T) {
	injector := fault.New()
	c := config(testhsm.New(t))
	signed := make(chan string, 1)
	c.Pool.Wrap = func(m sessionpool.Module) sessionpool.Module { return injector.Wrap(reads{odd{m}, signed}) }
	c.Pool.OpTimeout = time.Second
	h := open(t, c)
	key := generate(t, h, "key", hsmkey.Ed25519)
	s, err := h.Source().Acquire(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Release()
	_, release := injector.Hang("C_SignInit")
	const message = "the caller goes on to use this"
	input := []byte(message)
	if _, err := key.In(s).SignJWS(context.Background(), hsmkey.EdDSA, input); !errors.Is(err, hsmkey.ErrTimeout) {
		t.Errorf("SignJWS = %v, want ErrTimeout", err)
	}
	clear(input)
	release()
	if got := <-signed; got != message {
		t.Errorf("the call that hung went on with %q", got)
	}
}

func TestKeysOfAClosedHSMAreClosed(t *testing.T) {
	h := newHSM(t)
	key := generate(t, h, "key", hsmkey.P256)
	for range 2 {
		if err := h.Close(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := key.SignJWS(context.Background(), hsmkey.ES256, nil); !errors.Is(err, hsmkey.ErrClosed) {
		t.Errorf("SignJWS = %v, want ErrClosed", err)
	}
	if _, err := h.Key(context.Background(), hsmkey.Query{Label: "key"}); !errors.Is(err, hsmkey.ErrClosed) {
		t.Errorf("Key = %v, want ErrClosed", err)
	}
	if _, err := h.Keys(context.Background()); !errors.Is(err, hsmkey.ErrClosed) {
		t.Errorf("Keys = %v, want ErrClosed", err)
	}
	if _, err := h.Generate(context.Background(), "other", hsmkey.P256, nil); !errors.Is(err, hsmkey.ErrClosed) {
		t.Errorf("Generate = %v, want ErrClosed", err)
	}
}

func TestAMACIsVerifiedInTheHSM(t *testing.T) {
	h := newHSM(t)
	key, other := generate(t, h, "key", hsmkey.HMAC512), generate(t, h, "other", hsmkey.HMAC512)
	for _, algorithm := range key.Algorithms() {
		mac, err := key.SignJWS(context.Background(), algorithm, []byte("a.b"))
		if err != nil {
			t.Fatal(err)
		}
		if err := key.VerifyMAC(context.Background(), algorithm, []byte("a.b"), mac); err != nil {
			t.Errorf("%s: %v", algorithm, err)
		}
		flipped := bytes.Clone(mac)
		flipped[0] ^= 1
		for name, err := range map[string]error{
			"another message": key.VerifyMAC(context.Background(), algorithm, []byte("a.c"), mac),
			"another code":    key.VerifyMAC(context.Background(), algorithm, []byte("a.b"), flipped),
			"half a code":     key.VerifyMAC(context.Background(), algorithm, []byte("a.b"), mac[:len(mac)/2]),
			"no code":         key.VerifyMAC(context.Background(), algorithm, []byte("a.b"), nil),
			"another key":     other.VerifyMAC(context.Background(), algorithm, []byte("a.b"), mac),
		} {
			if !errors.Is(err, hsmkey.ErrMAC) {
				t.Errorf("%s with %s: %v, want ErrMAC", algorithm, name, err)
			}
		}
	}
	if err := key.VerifyMAC(context.Background(), hsmkey.RS256, nil, nil); !errors.Is(err, hsmkey.ErrUnsupported) || errors.Is(err, hsmkey.ErrMAC) {
		t.Errorf("VerifyMAC by RS256 = %v, want ErrUnsupported", err)
	}
	pair := generate(t, h, "pair", hsmkey.P256)
	if err := pair.VerifyMAC(context.Background(), hsmkey.ES256, nil, nil); !errors.Is(err, hsmkey.ErrUnsupported) {
		t.Errorf("VerifyMAC with a key pair = %v, want ErrUnsupported", err)
	}
}
