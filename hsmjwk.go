package hsmkey

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// HSMJWK is a signing key whose private half, or secret, stays in the HSM. It
// holds no session and no handle: each signature takes a session from the
// source, finds the key there, proves that it is this one, and signs. It
// implements [crypto.Signer] and [crypto.MessageSigner].
//
// An HSMJWK is immutable and safe for concurrent use. [HSMJWK.In] and
// [HSMJWK.WithContext] return copies.
type HSMJWK struct {
	material *material
	source   sessionpool.Source
	pinned   *sessionpool.Session
	ctx      context.Context
}

var (
	_ crypto.Signer        = (*HSMJWK)(nil)
	_ crypto.MessageSigner = (*HSMJWK)(nil)
)

// material is what is known about a key. Copies of an HSMJWK share it.
type material struct {
	identity   any   // an identity, ready to be looked up
	query      Query // how the key is found
	class      uint  // CKO_PRIVATE_KEY or CKO_SECRET_KEY
	label      string
	id         []byte
	typ        KeyType
	algorithms []Algorithm
	public     crypto.PublicKey // nil for a secret
	mark       []byte           // of a secret, see [token.mark]
	always     atomic.Bool      // CKA_ALWAYS_AUTHENTICATE on some token

	// worked remembers which way a token signs. The map is never written to, but
	// replaced.
	worked atomic.Pointer[map[choice]int]

	leftOut leftOut
}

// String names the key for errors.
func (m *material) String() string { return nameKey(m.label, m.id) }

// identity is what sessions remember a located key by. It is the same however
// often a program looks the key up, so that what they remember does not grow.
type identity struct {
	label string
	id    string
	class uint
	proof [sha256.Size]byte // of the public key, or of the mark
}

func identify(m *material) (identity, error) {
	proof := m.mark
	if m.public != nil {
		der, err := x509.MarshalPKIXPublicKey(m.public)
		if err != nil {
			return identity{}, fmt.Errorf("%w: the public key of the key with %s: %w", ErrUnsupported, m, err)
		}
		proof = der
	}
	return identity{m.query.Label, string(m.query.ID), m.class, sha256.Sum256(proof)}, nil
}

// choice is what a way is remembered for.
type choice struct {
	token  *sessionpool.Token
	scheme schemeID
}

// remember notes the way that worked. Of two that notice something at once one
// may be lost, and is noticed again.
func (m *material) remember(c choice, way int) {
	known := m.worked.Load()
	next := map[choice]int{c: way}
	if known != nil {
		for k, v := range *known {
			if k != c {
				next[k] = v
			}
		}
	}
	m.worked.CompareAndSwap(known, &next)
}

// recall returns the way that worked, or -1.
func (m *material) recall(c choice) int {
	if known := m.worked.Load(); known != nil {
		if way, ok := (*known)[c]; ok {
			return way
		}
	}
	return -1
}

// Label returns the key's CKA_LABEL, without padding.
func (k *HSMJWK) Label() string { return k.material.label }

// ID returns the key's CKA_ID; it may be empty.
func (k *HSMJWK) ID() []byte { return bytes.Clone(k.material.id) }

// Type returns the key's kind and size. It may be one that cannot be generated,
// such as "rsa:1024" or "hmac:320".
func (k *HSMJWK) Type() KeyType { return k.material.typ }

// Public returns the public key: *rsa.PublicKey, *ecdsa.PublicKey or
// ed25519.PublicKey. An HMAC key has none, it returns nil.
func (k *HSMJWK) Public() crypto.PublicKey { return k.material.public }

// Algorithms returns what the key signs with by its kind and size, the default
// first. It is empty for an RSA key of less than 2048 bits, with which JOSE does
// not sign (RFC 7518 section 3.3).
func (k *HSMJWK) Algorithms() []Algorithm { return slices.Clone(k.material.algorithms) }

// In returns the same key pinned to one session: it signs there and nowhere
// else, and a failure of the session is the caller's to handle. It is the shape
// for many signatures in a row. The session stays the caller's, who must not use
// it from two goroutines at once, nor the key after its release.
func (k *HSMJWK) In(session *sessionpool.Session) *HSMJWK {
	c := *k
	c.pinned = session
	return &c
}

// Source returns where the key takes its sessions from, nil for a key that is
// pinned to one by [HSMJWK.In].
func (k *HSMJWK) Source() sessionpool.Source {
	if k.pinned != nil {
		return nil
	}
	return k.source
}

// WithContext returns the same key whose Sign and SignMessage, which take no
// context, use ctx. Without it they wait for as long as the configured timeouts
// let them.
func (k *HSMJWK) WithContext(ctx context.Context) *HSMJWK {
	c := *k
	c.ctx = ctx
	return &c
}

// context returns what bounds calls that take no context.
func (k *HSMJWK) context() context.Context {
	if k.ctx != nil {
		return k.ctx
	}
	return context.Background()
}

// withSession runs fn in the session that the key is pinned to, or in sessions
// of its source until one carries it through. HSMs that are left out for the
// scheme are asked only where there is no other.
func (k *HSMJWK) withSession(ctx context.Context, scheme schemeID, fn func(*sessionpool.Session) error) error {
	if k.pinned != nil {
		return fn(k.pinned)
	}
	avoid := k.material.leftOut.avoid(scheme)
	err := sessionpool.Retry(ctx, k.source, fn, avoid...)
	if len(avoid) > 0 && errors.Is(err, sessionpool.ErrUnsuitable) {
		err = sessionpool.Retry(ctx, k.source, fn)
	}
	return err
}
