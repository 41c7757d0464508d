package hsmkey

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// SignJWS signs a JWS signing input (RFC 7515 section 5.1) and returns the
// signature as JWS has it: RFC 7518 section 3, with ECDSA's as R || S, and RFC
// 8037 section 3.1. It is safe to call from many goroutines.
//
// The private-key operation is the HSM's. Hashing is done here where the token
// has a mechanism for hashes, else there. When a session or an HSM fails, the
// signature is made on another one until ctx ends.
//
// The error matches ErrUnsupported if the algorithm does not belong to the key
// or no token has a mechanism for it, ErrInvalid if the HSM hashes and refuses this
// input, which may be too long for it, ErrKeyMismatch if tokens have another key
// under its name, ErrKeyNotFound if they have none.
func (k *HSMJWK) SignJWS(ctx context.Context, algorithm Algorithm, signingInput []byte) ([]byte, error) {
	if !slices.Contains(k.material.algorithms, algorithm) {
		return nil, k.notAble(algorithm)
	}
	return k.sign(ctx, k.newSigning(schemes[algorithm], signingInput))
}

// notAble says why a key does not sign by an algorithm.
func (k *HSMJWK) notAble(algorithm Algorithm) error {
	m := k.material
	if len(m.algorithms) == 0 {
		return fmt.Errorf("%w: the key with %s is %s, too short for JOSE (RFC 7518 sections 3.3 and 3.5 want 2048 bits)",
			ErrUnsupported, m, m.typ)
	}
	return fmt.Errorf("%w: the key with %s is %s and does not sign %s; it signs %v",
		ErrUnsupported, m, m.typ, algorithm, m.algorithms)
}

// signing is one signature to be made.
type signing struct {
	scheme  *scheme
	message []byte // nil: only its hash is known
	copied  bool   // message is ours
	hashed  []byte // the DigestInfo, or the digest where the scheme has none
	size    int    // of the signature
	buffer  [maxDigestInfo]byte
}

const maxDigestInfo = 19 + sha512.Size

// newSigning hashes a message for a signature by a scheme.
func (k *HSMJWK) newSigning(s *scheme, message []byte) *signing {
	j := &signing{scheme: s, message: message, size: k.signatureSize(s)}
	if message == nil {
		j.message, j.copied = []byte{}, true
	}
	if s.ways[0].input != inputMessage {
		j.hashed = k.truncate(s, s.appendHash(append(j.buffer[:0], s.prefix...), message))
	}
	return j
}

func (s *scheme) appendHash(dst, message []byte) []byte {
	switch s.id.hash {
	case crypto.SHA256:
		digest := sha256.Sum256(message)
		return append(dst, digest[:]...)
	case crypto.SHA384:
		digest := sha512.Sum384(message)
		return append(dst, digest[:]...)
	default:
		digest := sha512.Sum512(message)
		return append(dst, digest[:]...)
	}
}

// newDigestSigning is a signature of a message of which only the hash is known.
func (k *HSMJWK) newDigestSigning(s *scheme, digest []byte) *signing {
	return &signing{
		scheme: s,
		hashed: k.truncate(s, slices.Concat(s.prefix, digest)),
		size:   k.signatureSize(s),
	}
}

// truncate shortens a digest to the length of an ECDSA key (FIPS 186-5 section
// 6.4.1); some modules refuse longer ones.
func (k *HSMJWK) truncate(s *scheme, digest []byte) []byte {
	if s.id.family == familyECDSA {
		return digest[:min(len(digest), k.signatureSize(s)/2)]
	}
	return digest
}

// signatureSize is the exact length of a signature in bytes: the length that
// some modules tell is wrong.
func (k *HSMJWK) signatureSize(s *scheme) int {
	switch public := k.material.public.(type) {
	case *rsa.PublicKey:
		return public.Size()
	case *ecdsa.PublicKey:
		return 2 * curveOf(public).size
	case nil:
		return s.id.hash.Size()
	}
	return 2 * curveEd25519.size
}

// data is what a way of signing is given. A call that hangs in the module goes
// on reading it after its caller was told, so it is never the caller's memory.
func (j *signing) data(w *way) []byte {
	switch w.input {
	case inputDigest:
		return j.hashed[len(j.scheme.prefix):]
	case inputDigestInfo:
		return j.hashed
	}
	if !j.copied {
		j.message, j.copied = bytes.Clone(j.message), true
	}
	return j.message
}

// sign makes a signature as PKCS#11 has it. All signatures of this package go
// through here.
func (k *HSMJWK) sign(ctx context.Context, j *signing) ([]byte, error) {
	var signature []byte
	p := plan{scheme: j.scheme}
	err := k.withSession(ctx, j.scheme.id, func(s *sessionpool.Session) (err error) {
		signature, err = k.signOn(ctx, s, j, &p)
		return err
	})
	if err != nil {
		return nil, err
	}
	return signature, nil
}

// signOn makes a signature in one session, by the first way that the token
// accepts.
func (k *HSMJWK) signOn(ctx context.Context, s *sessionpool.Session, j *signing, p *plan) ([]byte, error) {
	if t := s.Token(); t != p.token {
		*p = plan{scheme: j.scheme, token: t}
	}
	c := choice{p.token, j.scheme.id}
	worked := k.material.recall(c)
	for {
		i := p.next(worked, j.message != nil)
		switch {
		case i < 0 && p.message != nil:
			return nil, sessionpool.Elsewhere(p.unfit(len(j.message)))
		case i < 0:
			if j.message != nil { // nothing more could be tried
				k.material.leftOut.note(s, j.scheme.id)
			}
			return nil, sessionpool.Elsewhere(p.unsupported(j.message != nil))
		}
		signature, err := k.signBy(ctx, s, j, &j.scheme.ways[i])
		if err == nil {
			if i != worked {
				k.material.remember(c, i)
			}
			return signature, nil
		}
		if !p.settle(i, err) {
			return nil, err
		}
	}
}

// signBy makes a signature in one session by one mechanism.
func (k *HSMJWK) signBy(ctx context.Context, s *sessionpool.Session, j *signing, w *way) ([]byte, error) {
	a := &attempt{key: k.material, session: s, way: w, data: j.data(w), size: j.size}
	err := a.do(ctx)
	if errors.Is(err, errWantsPIN) {
		k.material.always.Store(true)
		err = a.do(ctx)
	}
	if err == nil {
		return a.signature, nil
	}
	var u *unlocated
	if errors.As(err, &u) && !errors.Is(err, ErrSession) {
		k.material.leftOut.note(s, schemeID{})
		return nil, sessionpool.Elsewhere(u.cause)
	}
	return nil, err
}

// unlocated is why a key could not be found, or not be proven to be the same,
// on a token that answers: another token may have it.
type unlocated struct{ cause error }

func (u *unlocated) Error() string { return u.cause.Error() }
func (u *unlocated) Unwrap() error { return u.cause }

// attempt is one call for a signature. It is given to the session's goroutine,
// which may still be at it after the caller was told of a timeout: so it is made
// anew for each call, and its result is read only after a success.
type attempt struct {
	key       *material
	session   *sessionpool.Session
	way       *way
	data      []byte
	lots      *stream // to be signed instead of data
	size      int     // of a signature
	pin       string  // for a key that wants a login before each signature
	signature []byte
}

func (a *attempt) do(ctx context.Context) (err error) {
	if a.key.always.Load() {
		if a.pin, err = a.session.ContextPIN(ctx); err != nil {
			return err
		}
	}
	return a.session.Do(ctx, a.run)
}

func (a *attempt) run(m sessionpool.Module, h pkcs11.SessionHandle) error {
	at, err := a.session.Memo(a.key.identity, func() (any, error) {
		return token{m, h, a.session.Token().Name()}.locate(a.key)
	})
	if err != nil {
		return &unlocated{err}
	}
	key := at.(*located) //nolint:errcheck // what the line above remembers
	switch {
	case a.lots != nil:
		a.lots.given = 0
		return m.SignLots(a.lots.ctx, h, a.way.mechanism, key.handle, a.size, a.lots.next, a.lots.signed)
	case key.always:
		a.signature, err = a.signAfterLogin(m, h, key.handle)
	default:
		a.signature, err = m.SignSingle(nil, h, a.way.mechanism, key.handle, a.data, a.size)
		if err != nil {
			err = &refusal{a.way.name, err}
		}
	}
	if err == nil && len(a.signature) != a.size {
		err = &refusal{a.way.name, fmt.Errorf("a signature of %d bytes, want %d", len(a.signature), a.size)}
	}
	return err
}
