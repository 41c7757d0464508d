package main

import (
	"cmp"
	"context"
	"crypto"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/ThalesGroup/crypto11"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/cryptosigner"
	"github.com/letsencrypt/pkcs11key/v4"
	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/jws"
)

func newSigner(name, module, token string) (signer, error) {
	switch name {
	case bareGo:
		return newMiekgLoop(module, token)
	case overCrypto11:
		c, err := crypto11.Configure(&crypto11.Config{Path: module, TokenLabel: token, Pin: testhsm.PIN, MaxSessions: 64})
		return &thales{c, map[string]jose.Signer{}}, err
	case overPkcs11k:
		return &letsencrypt{module: module, token: token, signers: map[string]jose.Signer{}}, nil
	case single, batch:
		hsm, err := hsmkey.Open(context.Background(), hsmkey.Config{Pool: poolConfig(module, token)})
		return &ours{hsm: hsm, batch: name == batch, signers: map[string]*jws.Signer{}, speeds: map[speed]float64{}}, err
	}
	return nil, fmt.Errorf("no peer is called %q", name)
}

// miekgLoop is the bare loop through miekg/pkcs11, as internal/bareloop is in C:
// one session for each goroutine, always the same bytes.
type miekgLoop struct {
	module   *pkcs11.Ctx
	slot     uint
	sessions []pkcs11.SessionHandle
}

func newMiekgLoop(module, token string) (*miekgLoop, error) {
	l := &miekgLoop{module: pkcs11.New(module)}
	if l.module == nil {
		return nil, fmt.Errorf("cannot load %s", module)
	}
	if err := l.module.Initialize(); err != nil {
		return nil, err
	}
	slots, err := l.module.GetSlotList(true)
	if err != nil {
		return nil, err
	}
	for _, slot := range slots {
		if info, err := l.module.GetTokenInfo(slot); err == nil && strings.TrimRight(info.Label, " ") == token {
			l.slot = slot
			if err := l.open(1); err != nil {
				return nil, err
			}
			return l, l.module.Login(l.sessions[0], pkcs11.CKU_USER, testhsm.PIN)
		}
	}
	return nil, fmt.Errorf("there is no token %s", token)
}

func (l *miekgLoop) open(sessions int) error {
	for len(l.sessions) < sessions {
		h, err := l.module.OpenSession(l.slot, pkcs11.CKF_SERIAL_SESSION)
		if err != nil {
			return err
		}
		l.sessions = append(l.sessions, h)
	}
	return nil
}

func (l *miekgLoop) find(label string) (pkcs11.ObjectHandle, error) {
	err := l.module.FindObjectsInit(l.sessions[0], []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
	})
	if err != nil {
		return 0, err
	}
	keys, _, err := l.module.FindObjects(l.sessions[0], 2)
	if err = errors.Join(err, l.module.FindObjectsFinal(l.sessions[0])); err != nil {
		return 0, err
	}
	if len(keys) != 1 {
		return 0, fmt.Errorf("%d keys with label %s", len(keys), label)
	}
	return keys[0], nil
}

const ckmEdDSA = 0x1057

func (l *miekgLoop) sign(alg hsmkey.Algorithm, label string, sessions int, until time.Time) (int64, error) {
	if err := l.open(sessions); err != nil {
		return 0, err
	}
	key, err := l.find(label)
	if err != nil {
		return 0, err
	}
	data := make([]byte, 32)
	var mechanism *pkcs11.Mechanism
	switch alg {
	case hsmkey.RS256:
		mechanism = pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS, nil)
		// What PKCS #1 puts before a digest (RFC 8017, section 9.2).
		info, err := hex.DecodeString("3031300d060960864801650304020105000420")
		if err != nil {
			return 0, err
		}
		data = append(info, data...)
	case hsmkey.PS256:
		mechanism = pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_PSS, pkcs11.NewPSSParams(pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256, 32))
	case hsmkey.ES256:
		mechanism = pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)
	default:
		mechanism = pkcs11.NewMechanism(ckmEdDSA, nil)
		data = make([]byte, 300)
	}
	workers := make([]func() error, sessions)
	for i := range workers {
		workers[i] = func() error {
			if err := l.module.SignInit(l.sessions[i], []*pkcs11.Mechanism{mechanism}, key); err != nil {
				return err
			}
			_, err := l.module.Sign(l.sessions[i], data)
			return err
		}
	}
	return loop(until, workers)
}

// compactToken makes tokens as a program does that has go-jose and a crypto.Signer.
func compactToken(signer jose.Signer) error {
	object, err := signer.Sign(claims)
	if err != nil {
		return err
	}
	_, err = object.CompactSerialize()
	return err
}

// goJOSE tries out whether go-jose can use a key for an algorithm at all.
func goJOSE(alg hsmkey.Algorithm, key crypto.Signer) (jose.Signer, error) {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(alg), Key: cryptosigner.Opaque(key)}, nil)
	if err == nil {
		err = compactToken(signer)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errCannot, err)
	}
	return signer, nil
}

// thales is go-jose over a key of crypto11.
type thales struct {
	context *crypto11.Context
	signers map[string]jose.Signer
}

func (t *thales) sign(alg hsmkey.Algorithm, label string, sessions int, until time.Time) (int64, error) {
	s := t.signers[label]
	if s == nil {
		key, err := t.context.FindKeyPair(nil, []byte(label))
		if err == nil && key == nil {
			err = errors.New("the key is not found")
		}
		if err != nil {
			return 0, fmt.Errorf("%w: %w", errCannot, err)
		}
		if s, err = goJOSE(alg, key); err != nil {
			return 0, err
		}
		t.signers[label] = s
	}
	return repeat(until, sessions, func() error { return compactToken(s) })
}

// letsencrypt is go-jose over a pool of pkcs11key, which has a fixed number of
// sessions and wants to know the public key.
type letsencrypt struct {
	module, token string
	signers       map[string]jose.Signer
}

func (l *letsencrypt) sign(alg hsmkey.Algorithm, label string, sessions int, until time.Time) (int64, error) {
	name := fmt.Sprint(label, sessions)
	s := l.signers[name]
	if s == nil {
		public, err := l.publicKey(label)
		if err != nil {
			return 0, err
		}
		pool, err := pkcs11key.NewPool(sessions, l.module, l.token, testhsm.PIN, public)
		if err != nil {
			return 0, fmt.Errorf("%w: %w", errCannot, err)
		}
		if s, err = goJOSE(alg, pool); err != nil {
			return 0, err
		}
		l.signers[name] = s
	}
	return repeat(until, sessions, func() error { return compactToken(s) })
}

// publicKey reads a public key by our own library, in the same process: it adopts
// a module that is initialised already, and pkcs11key accepts one, too.
func (l *letsencrypt) publicKey(label string) (crypto.PublicKey, error) {
	ctx := context.Background()
	hsm, err := hsmkey.Open(ctx, hsmkey.Config{Pool: poolConfig(l.module, l.token)})
	if err != nil {
		return nil, err
	}
	key, err := hsm.Key(ctx, hsmkey.Query{Label: label})
	if err != nil {
		return nil, errors.Join(err, hsm.Close(ctx))
	}
	return key.Public(), hsm.Close(ctx)
}

// ours is this project.
type ours struct {
	hsm     *hsmkey.HSM
	batch   bool
	signers map[string]*jws.Signer
	speeds  map[speed]float64 // tokens a second, as measured last
}

type speed struct {
	alg      hsmkey.Algorithm
	sessions int
}

func (o *ours) sign(alg hsmkey.Algorithm, label string, sessions int, until time.Time) (int64, error) {
	ctx := context.Background()
	s := o.signers[label]
	if s == nil {
		key, err := o.hsm.Key(ctx, hsmkey.Query{Label: label})
		if err != nil {
			return 0, err
		}
		if s, err = jws.NewSigner(key, jws.Options{Algorithm: alg}); err != nil {
			return 0, err
		}
		o.signers[label] = s
	}
	if !o.batch {
		return repeat(until, sessions, func() error {
			_, err := s.Sign(ctx, claims)
			return err
		})
	}
	return o.signBatch(ctx, s, speed{alg, sessions}, until)
}

// firstTokens are signed where nothing was measured before: enough for all sessions
// to be at work, and not long with RSA.
const firstTokens = 2000

// signBatch signs as many tokens as fit into the time, by what was measured before;
// all of them, because it is a batch's own affair to end without idle sessions.
func (o *ours) signBatch(ctx context.Context, s *jws.Signer, v speed, until time.Time) (int64, error) {
	start := time.Now()
	most := cmp.Or(int64(o.speeds[v]*time.Until(until).Seconds()), firstTokens)
	items := func(yield func([]byte) bool) {
		for n := int64(0); n < most && yield(claims); n++ {
		}
	}
	for _, err := range s.Batch(ctx, items, jws.BatchOptions{Sessions: v.sessions}) {
		if err != nil {
			return 0, err
		}
	}
	o.speeds[v] = float64(most) / time.Since(start).Seconds()
	return most, nil
}
