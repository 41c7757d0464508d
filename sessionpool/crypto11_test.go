package sessionpool_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"testing"

	"github.com/ThalesGroup/crypto11"
	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// beside is crypto11 on the token of an HSM, in the same process.
func beside(t *testing.T, h *hsm) *crypto11.Context {
	t.Helper()
	theirs, err := crypto11.Configure(&crypto11.Config{Path: h.Module, TokenLabel: h.Labels[0], Pin: testhsm.PIN})
	if err != nil {
		t.Fatal(err)
	}
	return theirs
}

// key11 makes a key that both can use.
func key11(t *testing.T, theirs *crypto11.Context) (crypto11.Signer, *ecdsa.PublicKey) {
	t.Helper()
	key, err := theirs.GenerateECDSAKeyPairWithLabel([]byte{1}, []byte("key"), elliptic.P256())
	if err != nil {
		t.Fatal(err)
	}
	pub, ok := key.Public().(*ecdsa.PublicKey)
	if !ok {
		t.Fatalf("the public key is a %T", key.Public())
	}
	return key, pub
}

func mustSign11(t *testing.T, key crypto11.Signer, pub *ecdsa.PublicKey) {
	t.Helper()
	digest := sha256.Sum256([]byte(t.Name()))
	sig, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil || !ecdsa.VerifyASN1(pub, digest[:], sig) {
		t.Errorf("crypto11 does not sign any more: %v", err)
	}
}

func TestAfterCrypto11OursMayCloseFirst(t *testing.T) {
	h := newHSM(t)
	theirs := beside(t, h)
	key, pub := key11(t, theirs)
	p, err := sessionpool.New(h.cfg)
	if err != nil {
		t.Fatal(err)
	}
	s := acquire(t, p)
	mustSign(t, s, pub, "key")
	mustSign11(t, key, pub)
	s.Release()
	closePool(t, p)
	if n := h.fault.Calls("C_Finalize"); n != 0 {
		t.Errorf("C_Finalize was called %d times on their library", n)
	}
	mustSign11(t, key, pub)
	if err := theirs.Close(); err != nil {
		t.Error(err)
	}
}

func TestAfterCrypto11TheirsMayCloseFirst(t *testing.T) {
	h := newHSM(t)
	theirs := beside(t, h)
	_, pub := key11(t, theirs)
	p := h.pool(t)
	used, idle := acquire(t, p), acquire(t, p)
	mustSign(t, used, pub, "key")
	mustSign(t, idle, pub, "key")
	idle.Release()
	if err := theirs.Close(); err != nil { // which finalises the library
		t.Error(err)
	}
	mustSign(t, used, pub, "key")
	used.Release()
	s := acquire(t, p)
	mustSign(t, s, pub, "key")
	s.Release()
	closePool(t, p)
	if n := h.fault.Calls("C_Finalize"); n != 1 {
		t.Errorf("C_Finalize was called %d times, want once: the library is ours since", n)
	}
}

// crypto11 does not use a library that is initialised. It must not take ours
// with it when it gives up.
func TestCrypto11ThatComesLaterIsRefusedWithoutHarm(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	pub := makeKey(t, p, "key")
	s := acquire(t, p)
	defer s.Release()
	mustSign(t, s, pub, "key")
	_, err := crypto11.Configure(&crypto11.Config{Path: h.Module, TokenLabel: h.Labels[0], Pin: testhsm.PIN})
	if !errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)) {
		t.Errorf("crypto11: %v, want CKR_CRYPTOKI_ALREADY_INITIALIZED", err)
	}
	mustSign(t, s, pub, "key")
	if st := p.Stats(); st.Recoveries != 0 || st.Logins != 1 {
		t.Errorf("stats %+v, want nothing to recover from", st)
	}
}

// With a private instance of the library there is no order to keep.
func TestBesideAPrivatePoolCrypto11ComesAndGoesAsItLikes(t *testing.T) {
	private := func(c *sessionpool.Config) { c.Private = true }
	for _, oursFirst := range []bool{true, false} {
		for _, oursClosesFirst := range []bool{true, false} {
			h := newHSM(t)
			var p *sessionpool.Pool
			if oursFirst {
				p = h.pool(t, private)
				acquire(t, p).Release()
			}
			theirs := beside(t, h)
			key, pub := key11(t, theirs)
			if !oursFirst {
				p = h.pool(t, private)
			}
			s := acquire(t, p)
			mustSign(t, s, pub, "key")
			mustSign11(t, key, pub)
			if !oursClosesFirst {
				if err := theirs.Close(); err != nil {
					t.Error(err)
				}
				mustSign(t, s, pub, "key")
			}
			s.Release()
			closePool(t, p)
			if oursClosesFirst {
				mustSign11(t, key, pub)
				if err := theirs.Close(); err != nil {
					t.Error(err)
				}
			}
			if st := p.Stats(); st.Recoveries != 0 || st.Logins != 1 || !st.PINVerified && st.LoggedIn {
				t.Errorf("stats %+v, want one login of ours and nothing to recover from", st)
			}
		}
	}
}
