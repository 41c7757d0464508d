package jws

import (
	"cmp"
	"context"
	"crypto"
	"fmt"
	"slices"
	"strings"

	"github.com/go-jose/go-jose/v4"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jwk"
)

// Options describes the tokens of a [Signer]. The zero value is usable.
type Options struct {
	// Algorithm is the "alg" header. Empty: the key's default, which is RS256,
	// ES256, ES384, ES512, EdDSA, HS256, HS384 or HS512.
	Algorithm hsmkey.Algorithm

	// KeyID is the "kid" header. Empty: [jwk.KeyID], the key's thumbprint.
	KeyID string

	// NoKeyID leaves the "kid" header out.
	NoKeyID bool

	// Type is the "typ" header, "JWT" for instance, and ContentType the "cty"
	// header (RFC 7515, sections 4.1.9 and 4.1.10). Empty: left out.
	Type        string
	ContentType string

	// Header holds further members of the protected header. They are written
	// once, when the signer is made. They can override nothing: names that
	// JOSE registers for itself are refused.
	Header map[string]any
}

// Signer makes tokens with one key, one algorithm and one protected header. It
// may be used by several goroutines at once.
type Signer struct {
	alg    hsmkey.Algorithm
	keyID  string
	prefix []byte // the protected header as it stands in a token, and its dot
	size   int    // length of a signature in bytes
	sign   signFunc
	jose   jose.Signer
	key    *hsmkey.HSMJWK // nil: a key that is no HSM's
}

// signFunc returns the signature value that RFC 7518 section 3 defines for the
// signer's algorithm, over a signing input.
type signFunc func(ctx context.Context, input []byte) ([]byte, error)

// NewSigner returns a signer with a key on the HSM. The private-key operation,
// or the MAC, is always the HSM's.
//
// It fails with [hsmkey.ErrUnsupported] for an algorithm that the key cannot do
// and with [hsmkey.ErrConfig] for options that cannot be: an extra header that
// is reserved or no JSON, KeyID together with NoKeyID. It does not touch the HSM.
func NewSigner(key *hsmkey.HSMJWK, opts Options) (*Signer, error) {
	if key == nil {
		return nil, fmt.Errorf("%w: there is no key", hsmkey.ErrConfig)
	}
	s, err := forKey(key, opts)
	if err != nil {
		return nil, err
	}
	s.key = key
	return s, nil
}

func forKey(key *hsmkey.HSMJWK, opts Options) (*Signer, error) {
	algs := key.Algorithms()
	if len(algs) == 0 {
		return nil, fmt.Errorf("%w: JOSE has no algorithm for key %q (%v)", hsmkey.ErrUnsupported, key.Label(), key.Type())
	}
	opts.Algorithm = cmp.Or(opts.Algorithm, algs[0])
	if !slices.Contains(algs, opts.Algorithm) {
		return nil, fmt.Errorf("%w: key %q (%v) cannot do %s, only %s", hsmkey.ErrUnsupported, key.Label(), key.Type(), opts.Algorithm, join(algs))
	}
	if pub := key.Public(); pub != nil {
		bind := func(alg hsmkey.Algorithm) signFunc { return onHSM(key, alg) }
		return fromPublic(pub, bind, opts)
	}
	kid, err := jwk.KeyID(key)
	if err != nil {
		return nil, err
	}
	alg := opts.Algorithm
	return newSigner(alg, kid, hashes[alg].Size(), onHSM(key, alg), opts)
}

// onHSM signs with a key on the HSM.
func onHSM(key *hsmkey.HSMJWK, alg hsmkey.Algorithm) signFunc {
	return func(ctx context.Context, input []byte) ([]byte, error) { return key.SignJWS(ctx, alg, input) }
}

// FromSigner returns a signer with any [crypto.Signer]: a key of crypto11, of a
// cloud's KMS, an agent's, one in memory. PS256, PS384 and PS512 ask it for a
// salt as long as the hash, as RFC 7518 section 3.5 demands; ECDSA signatures are
// converted from the DER form that such signers return.
//
// A crypto.Signer knows no context: the ctx of [Signer.Sign] is looked at before
// it is called. Errors are those of [NewSigner], [jwk.ErrPrivate] aside, and a
// [*hsmkey.HSMJWK] is treated as NewSigner does.
func FromSigner(signer crypto.Signer, opts Options) (*Signer, error) {
	switch signer := signer.(type) {
	case nil:
		return nil, fmt.Errorf("%w: there is no key", hsmkey.ErrConfig)
	case *hsmkey.HSMJWK:
		return NewSigner(signer, opts)
	}
	pub := signer.Public()
	bind := func(alg hsmkey.Algorithm) signFunc { return foreign(signer, pub, alg) }
	return fromPublic(pub, bind, opts)
}

// fromPublic makes a signer for a key pair, given its public half and what signs
// with an algorithm. It is the one place that decides which algorithms a key pair
// may do and what its kid is.
func fromPublic(pub crypto.PublicKey, bind func(hsmkey.Algorithm) signFunc, opts Options) (*Signer, error) {
	var keyOpts []jwk.Option
	if opts.Algorithm != "" {
		keyOpts = append(keyOpts, jwk.WithAlgorithm(opts.Algorithm))
	}
	key, err := jwk.FromPublic(pub, keyOpts...)
	if err != nil {
		return nil, err
	}
	alg := key.Algorithm()
	return newSigner(alg, key.KeyID(), signatureSize(pub), bind(alg), opts)
}

func newSigner(alg hsmkey.Algorithm, kid string, size int, sign signFunc, opts Options) (*Signer, error) {
	switch {
	case opts.NoKeyID && opts.KeyID != "":
		return nil, fmt.Errorf("%w: KeyID is %q and NoKeyID is set", hsmkey.ErrConfig, opts.KeyID)
	case opts.NoKeyID:
		kid = ""
	case opts.KeyID != "":
		kid = opts.KeyID
	}
	headers, err := opts.joseHeaders(kid)
	if err != nil {
		return nil, err
	}
	s := &Signer{alg: alg, keyID: kid, size: size, sign: sign}
	if s.jose, err = joseSigner(alg, headers, sign); err != nil {
		return nil, err
	}
	if s.prefix, err = encodedHeader(alg, headers); err != nil {
		return nil, err
	}
	return s, nil
}

// Algorithm returns the "alg" of the signer's tokens.
func (s *Signer) Algorithm() hsmkey.Algorithm { return s.alg }

// KeyID returns the "kid" of the signer's tokens, empty if they have none.
func (s *Signer) KeyID() string { return s.keyID }

// EncodedHeader returns the protected header as it stands in every token of the
// signer, in base64url: what is before the first dot.
func (s *Signer) EncodedHeader() string { return string(s.prefix[:len(s.prefix)-1]) }

// Jose returns the signer for go-jose's own API, [jwt.Signed] and the rest. Its
// Sign has no context: Config.OpTimeout bounds what it waits for.
//
// [jwt.Signed]: https://pkg.go.dev/github.com/go-jose/go-jose/v4/jwt#Signed
func (s *Signer) Jose() jose.Signer { return s.jose }

// join lists algorithms for people.
func join(algs []hsmkey.Algorithm) string {
	names := make([]string, len(algs))
	for i, alg := range algs {
		names[i] = string(alg)
	}
	return strings.Join(names, ", ")
}
