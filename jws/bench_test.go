package jws_test

import (
	"context"
	"crypto"
	"encoding/hex"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThalesGroup/crypto11"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/cryptosigner"
	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/fault"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/jws"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// Rounds of BenchmarkPeers, and how long each peer signs in each of them. The
// median of the rounds is reported.
const (
	peerRounds   = 31
	peerDuration = 80 * time.Millisecond
)

var benchClaims = []byte(`{"iss":"https://issuer.example","sub":"248289761001","aud":"client","iat":1700000000,"exp":1700003600,"jti":"01HF7"}`)

// peer is a way to sign. worker prepares what one goroutine needs and returns
// what makes one signature.
type peer struct {
	name   string
	worker func() func() error
}

// BenchmarkPeers compares, on one token in one process:
//
//   - bare: C_SignInit and C_Sign in a loop through miekg/pkcs11, each goroutine
//     in a session of its own, always over the same digest;
//   - crypto11: go-jose's compact serialisation over a crypto11 key;
//   - ours: Signer.Sign.
//
// The peers take turns in short rounds, so that what else the machine does hits
// all of them. It reports signatures per second, and the ratios of ours to the
// others, where more than 1 means that ours is faster.
func BenchmarkPeers(b *testing.B) {
	token := testhsm.New(b)
	// crypto11 goes first: it cannot use a module that is initialised already.
	theirs, err := crypto11.Configure(&crypto11.Config{Path: token.Module, TokenLabel: token.Labels[0], Pin: testhsm.PIN})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = theirs.Close() })
	hsm, err := hsmkey.Open(context.Background(), hsmkey.Config{Pool: sessionpool.Config{
		Module: token.Module, TokenLabel: token.Labels[0], PIN: sessionpool.StaticPIN(testhsm.PIN),
	}})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = hsm.Close(context.Background()) })
	bare := newBarePKCS11(b, token)

	// A digest, and what PKCS #1 puts before it (RFC 8017, section 9.2).
	digest := make([]byte, 32)
	prefix, err := hex.DecodeString("3031300d060960864801650304020105000420")
	if err != nil {
		b.Fatal(err)
	}
	for _, test := range []struct {
		alg       hsmkey.Algorithm
		typ       hsmkey.KeyType
		mechanism uint
		data      []byte
	}{
		{hsmkey.RS256, hsmkey.RSA2048, pkcs11.CKM_RSA_PKCS, append(prefix, digest...)},
		{hsmkey.ES256, hsmkey.P256, pkcs11.CKM_ECDSA, digest},
	} {
		key := generate(b, hsm, test.typ)
		signer, err := jws.NewSigner(key, jws.Options{Algorithm: test.alg})
		if err != nil {
			b.Fatal(err)
		}
		other, err := theirs.FindKeyPair(key.ID(), nil)
		if err != nil {
			b.Fatal(err)
		}
		peers := []peer{
			{"bare", func() func() error { return bare.signer(b, key.ID(), test.mechanism, test.data) }},
			{"crypto11", func() func() error { return goJOSE(b, other, jose.SignatureAlgorithm(test.alg)) }},
			{"ours", func() func() error {
				return func() error {
					_, err := signer.Sign(context.Background(), benchClaims)
					return err
				}
			}},
		}
		for _, goroutines := range []int{1, 8} {
			b.Run(fmt.Sprintf("%s/goroutines=%d", test.alg, goroutines), func(b *testing.B) {
				for b.Loop() {
					compare(b, peers, goroutines)
				}
			})
		}
	}
}

// compare lets the peers take turns and reports the medians.
func compare(b *testing.B, peers []peer, goroutines int) {
	workers := make([][]func() error, len(peers))
	for i, p := range peers {
		for range goroutines {
			workers[i] = append(workers[i], p.worker())
		}
	}
	rates := make([][]float64, len(peers))
	for round := range peerRounds {
		for turn := range peers {
			i := (round + turn) % len(peers) // each goes first as often as the others
			rate, err := measure(workers[i], peerDuration)
			if err != nil {
				b.Fatalf("%s: %v", peers[i].name, err)
			}
			rates[i] = append(rates[i], rate)
		}
	}
	ours := len(peers) - 1
	for i, p := range peers {
		b.ReportMetric(median(rates[i]), p.name+"/s")
		if i != ours {
			ratios := make([]float64, peerRounds)
			for r := range ratios {
				ratios[r] = rates[ours][r] / rates[i][r]
			}
			b.ReportMetric(median(ratios), "ours:"+p.name)
		}
	}
	b.ReportMetric(0, "ns/op") // of a whole comparison: nobody wants to know
}

// measure runs each worker in a goroutine for a while and returns how many times
// a second they signed together.
func measure(workers []func() error, d time.Duration) (float64, error) {
	runtime.GC()
	var (
		wg     sync.WaitGroup
		count  atomic.Int64
		failed atomic.Pointer[error]
	)
	start := time.Now()
	for _, sign := range workers {
		wg.Go(func() {
			for time.Since(start) < d {
				if err := sign(); err != nil {
					failed.Store(&err)
					return
				}
				count.Add(1)
			}
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return 0, *err
	}
	return float64(count.Load()) / time.Since(start).Seconds(), nil
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}

// goJOSE signs as a program does that has go-jose and crypto11.
func goJOSE(b *testing.B, key crypto.Signer, alg jose.SignatureAlgorithm) func() error {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: cryptosigner.Opaque(key)}, nil)
	if err != nil {
		b.Fatal(err)
	}
	return func() error {
		object, err := signer.Sign(benchClaims)
		if err != nil {
			return err
		}
		_, err = object.CompactSerialize()
		return err
	}
}

// barePKCS11 is the token through miekg/pkcs11 and nothing else. Somebody else
// initialised the module, logs in and finalises it.
type barePKCS11 struct {
	module *pkcs11.Ctx
	slot   uint
}

func newBarePKCS11(b *testing.B, token *testhsm.HSM) *barePKCS11 {
	module := pkcs11.New(token.Module)
	if module == nil {
		b.Fatalf("cannot load %s", token.Module)
	}
	b.Cleanup(module.Destroy)
	slots, err := module.GetSlotList(true)
	if err != nil {
		b.Fatal(err)
	}
	for _, slot := range slots {
		if info, err := module.GetTokenInfo(slot); err == nil && info.Label == token.Labels[0] {
			return &barePKCS11{module, slot}
		}
	}
	b.Fatal("the token is not there")
	return nil
}

// signer opens a session for one goroutine and returns what signs in it.
func (p *barePKCS11) signer(b *testing.B, id []byte, mechanism uint, data []byte) func() error {
	session, err := p.module.OpenSession(p.slot, pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = p.module.CloseSession(session) })
	err = p.module.FindObjectsInit(session, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_ID, id),
	})
	if err != nil {
		b.Fatal(err)
	}
	keys, _, err := p.module.FindObjects(session, 2)
	if err != nil || len(keys) != 1 {
		b.Fatalf("%d keys, %v", len(keys), err)
	}
	if err := p.module.FindObjectsFinal(session); err != nil {
		b.Fatal(err)
	}
	mechanisms := []*pkcs11.Mechanism{pkcs11.NewMechanism(mechanism, nil)}
	return func() error {
		if err := p.module.SignInit(session, mechanisms, keys[0]); err != nil {
			return err
		}
		_, err := p.module.Sign(session, data)
		return err
	}
}

// BenchmarkOurShare measures a token whose signature costs nothing: C_Sign
// answers at once. What is left is this package, the key and the pool.
func BenchmarkOurShare(b *testing.B) {
	injector := fault.New()
	token := testhsm.New(b)
	hsm, err := hsmkey.Open(context.Background(), hsmkey.Config{Pool: sessionpool.Config{
		Module: token.Module, TokenLabel: token.Labels[0], PIN: sessionpool.StaticPIN(testhsm.PIN), Wrap: injector.Wrap,
	}})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = hsm.Close(context.Background()) })
	key := generate(b, hsm, hsmkey.P256)
	signer, err := jws.NewSigner(key, jws.Options{})
	if err != nil {
		b.Fatal(err)
	}
	injector.Answer("C_Sign")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := signer.SignClaims(context.Background(), benchClaims); err != nil {
			b.Fatal(err)
		}
	}
}
