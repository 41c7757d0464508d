package hsmkey_test

import (
	"context"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/fault"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// BenchmarkSignJWS measures signatures as they come out of SoftHSM2, beside the
// bare PKCS#11 calls in one session.
func BenchmarkSignJWS(b *testing.B) {
	ctx := context.Background()
	h := newHSM(b)
	input := make([]byte, 300)
	for _, test := range []struct {
		typ       hsmkey.KeyType
		algorithm hsmkey.Algorithm
		mechanism *pkcs11.Mechanism
		data      int
	}{
		{hsmkey.P256, hsmkey.ES256, pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil), 32},
		{hsmkey.RSA2048, hsmkey.RS256, pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS, nil), 51},
		{hsmkey.Ed25519, hsmkey.EdDSA, pkcs11.NewMechanism(0x1057, nil), 300},
	} {
		key := generate(b, h, string(test.algorithm), test.typ)
		b.Run(string(test.algorithm)+"/bare", func(b *testing.B) {
			s, err := h.Source().Acquire(ctx)
			if err != nil {
				b.Fatal(err)
			}
			defer s.Release()
			err = s.Do(ctx, func(m sessionpool.Module, session pkcs11.SessionHandle) error {
				handles, err := find(m, session, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
					pkcs11.NewAttribute(pkcs11.CKA_ID, key.ID()))
				if err != nil {
					return err
				}
				b.ReportAllocs()
				for b.Loop() {
					if err := m.SignInit(session, []*pkcs11.Mechanism{test.mechanism}, handles[0]); err != nil {
						return err
					}
					if _, err := m.Sign(session, input[:test.data]); err != nil {
						return err
					}
				}
				return nil
			})
			if err != nil {
				b.Fatal(err)
			}
		})
		b.Run(string(test.algorithm), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := key.SignJWS(ctx, test.algorithm, input); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkOurShare measures what this package and the pool add to a module that
// signs at once.
func BenchmarkOurShare(b *testing.B) {
	ctx := context.Background()
	injector := fault.New()
	c := config(testhsm.New(b))
	c.Pool.Wrap = injector.Wrap
	h := open(b, c)
	key := generate(b, h, "fast", hsmkey.P256)
	injector.Answer("C_Sign")
	input := make([]byte, 300)
	b.Run("through the pool", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := key.SignJWS(ctx, hsmkey.ES256, input); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("in one session", func(b *testing.B) {
		s, err := h.Source().Acquire(ctx)
		if err != nil {
			b.Fatal(err)
		}
		defer s.Release()
		pinned := key.In(s)
		b.ReportAllocs()
		for b.Loop() {
			if _, err := pinned.SignJWS(ctx, hsmkey.ES256, input); err != nil {
				b.Fatal(err)
			}
		}
	})
}
