package jws

import (
	"cmp"
	"context"
	"crypto"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4/json"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jwk"
)

// The sentinels of verification. [hsmkey.ErrConfig] and the errors of the HSM are
// not among them.
var (
	// ErrVerify: the token does not verify: it was altered, is signed by another
	// key or with an algorithm that is not allowed, is expired, or is no token at
	// all. Every error that is the token's fault matches it; a missing HSM is
	// not. What it contains is not to be used.
	ErrVerify = errors.New("the token does not verify")

	// ErrMalformed: the token is no JWS, or uses what is not supported ("crit",
	// an unencoded payload). Errors that match it match ErrVerify too.
	ErrMalformed = fmt.Errorf("%w: it is malformed", ErrVerify)
)

// DefaultMaxSize is the length in bytes beyond which a token is refused unread.
const DefaultMaxSize = 1 << 20

// VerifierOptions says what a [Verifier] accepts. Algorithms must be given.
type VerifierOptions struct {
	// Algorithms are those that may have made the signature. A verifier that
	// takes what the token says can be told to check nothing.
	Algorithms []hsmkey.Algorithm

	// MaxSize is the length in bytes beyond which a token is refused unread.
	// Zero: DefaultMaxSize.
	MaxSize int

	// Leeway is how far the clocks of issuer and verifier may differ where
	// [Verifier.VerifyClaims] looks at times. Zero: jwt.DefaultLeeway, a minute.
	// Negative: none.
	Leeway time.Duration

	// Expected holds the issuer, subject, audience and id that VerifyClaims
	// demands, as far as they are set, and the time it takes for now.
	Expected jwt.Expected
}

// Verifier checks tokens against public keys or, for HMAC, with a key on the HSM.
// It may be used by several goroutines at once.
type Verifier struct {
	opts VerifierOptions
	keys []verifyKey
}

// Token is a token that verified.
type Token struct {
	Header  Header
	Payload []byte
}

// verifyKey is a key with the algorithms for which it is used.
type verifyKey struct {
	kid  string // empty: the key is tried for every token
	algs []hsmkey.Algorithm
	pub  crypto.PublicKey
	mac  *hsmkey.HSMJWK // set instead of pub for an HMAC key
}

// NewVerifier returns a verifier for tokens of any issuer whose keys are in the
// set. A token that names a kid is checked with the keys that have it and those
// that have none, one that names no kid with every key that fits.
//
// A set without a key for one of the allowed algorithms is [hsmkey.ErrUnsupported],
// as it is of a signer; options that cannot be are [hsmkey.ErrConfig].
func NewVerifier(keys jwk.Set, opts VerifierOptions) (*Verifier, error) {
	var list []verifyKey
	for _, k := range keys.Keys() {
		list = append(list, verifyKey{kid: k.KeyID(), algs: k.Algorithms(), pub: k.PublicKey()})
	}
	return newVerifier(list, opts)
}

// NewKeyVerifier returns a verifier for tokens of one key, whatever kid they
// name. The key is a public key of the types that [jwk.FromPublic] takes, or an
// [*hsmkey.HSMJWK]. The public half of a key pair on the HSM is used here, in
// software; a MAC is computed on the HSM, which keeps the secret.
//
// Errors are those of [NewVerifier] and jwk.FromPublic.
func NewKeyVerifier(key crypto.PublicKey, opts VerifierOptions) (*Verifier, error) {
	pub := key
	if hsm, ok := key.(*hsmkey.HSMJWK); ok && hsm != nil {
		if pub = hsm.Public(); pub == nil {
			return newVerifier([]verifyKey{{algs: hsm.Algorithms(), mac: hsm}}, opts)
		}
	}
	public, err := jwk.FromPublic(pub, jwk.WithKeyID(""), jwk.WithAlgorithm(""))
	if err != nil {
		return nil, err
	}
	return newVerifier([]verifyKey{{algs: public.Algorithms(), pub: pub}}, opts)
}

func newVerifier(keys []verifyKey, opts VerifierOptions) (*Verifier, error) {
	if len(opts.Algorithms) == 0 {
		return nil, fmt.Errorf("%w: a verifier needs the list of algorithms that it accepts", hsmkey.ErrConfig)
	}
	for _, alg := range opts.Algorithms {
		if _, known := hashes[alg]; !known {
			return nil, fmt.Errorf("%w: %q is not an algorithm for signatures", hsmkey.ErrConfig, alg)
		}
	}
	if opts.MaxSize < 0 {
		return nil, fmt.Errorf("%w: MaxSize is %d, want 0 (default) or more", hsmkey.ErrConfig, opts.MaxSize)
	}
	opts.MaxSize = cmp.Or(opts.MaxSize, DefaultMaxSize)
	opts.Leeway = max(0, cmp.Or(opts.Leeway, jwt.DefaultLeeway))
	opts.Algorithms = slices.Clone(opts.Algorithms)
	opts.Expected.AnyAudience = slices.Clone(opts.Expected.AnyAudience)

	usable := false
	for _, k := range keys {
		usable = usable || slices.ContainsFunc(opts.Algorithms, k.fits)
	}
	if !usable {
		return nil, fmt.Errorf("%w: none of the %d keys can verify %s", hsmkey.ErrUnsupported, len(keys), join(opts.Algorithms))
	}
	return &Verifier{opts: opts, keys: keys}, nil
}

func (k verifyKey) fits(alg hsmkey.Algorithm) bool { return slices.Contains(k.algs, alg) }

// Verify checks a token in compact, flattened or general form and returns what it
// contains. Of several signatures one must verify, with a protected header of its
// own that names its algorithm; the header returned is that one's. Unprotected
// headers are not looked at.
//
// It fails with [ErrVerify] for whatever is wrong with the token. For an HMAC key
// on the HSM the errors of [hsmkey.HSMJWK.VerifyMAC] come on top; ctx is for it.
func (v *Verifier) Verify(ctx context.Context, token string) (*Token, error) {
	if len(token) > v.opts.MaxSize {
		return nil, malformed("%d bytes, at most %d are read", len(token), v.opts.MaxSize)
	}
	signatures, err := parse(token)
	if err != nil {
		return nil, err
	}
	var failures []error
	for _, sig := range signatures {
		payload, err := v.check(ctx, sig)
		if err == nil {
			return &Token{Header: sig.header, Payload: payload}, nil
		}
		if !errors.Is(err, ErrVerify) {
			return nil, err
		}
		failures = append(failures, err)
	}
	return nil, errors.Join(failures...)
}

// VerifyClaims is [Verifier.Verify] for JWTs: it also demands that the payload is
// a JSON object that names no claim twice, that it is neither expired ("exp") nor
// used too early ("nbf"), nor issued in the future ("iat"), as far as it has these
// claims, and that it is what VerifierOptions.Expected describes. Which of them
// failed can be told by errors.Is with jwt.ErrExpired, jwt.ErrNotValidYet and the
// others of go-jose's jwt package; they match [ErrVerify] too.
//
// The claims are then decoded into dst, unless it is nil, by go-jose's JSON
// decoder, which takes names by their exact letters.
func (v *Verifier) VerifyClaims(ctx context.Context, token string, dst any) (*Token, error) {
	verified, err := v.Verify(ctx, token)
	if err != nil {
		return nil, err
	}
	if err := checkClaims(verified.Payload); err != nil {
		return nil, fmt.Errorf("%w: its payload is no claims set: %w", ErrVerify, err)
	}
	var claims jwt.Claims
	if err := json.Unmarshal(verified.Payload, &claims); err != nil {
		return nil, fmt.Errorf("%w: its payload is no claims set: %w", ErrVerify, inWords(claims, err))
	}
	if err := claims.ValidateWithLeeway(v.opts.Expected, v.opts.Leeway); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrVerify, inWords(claims, err))
	}
	if dst != nil {
		if err := json.Unmarshal(verified.Payload, dst); err != nil {
			return nil, fmt.Errorf("%w: its claims do not fit %T: %w", ErrVerify, dst, err)
		}
	}
	return verified, nil
}

// unfit is go-jose's error about claims, for errors.Is, in words for people.
type unfit struct {
	error
	words string
}

func (u *unfit) Error() string { return u.words }

func (u *unfit) Unwrap() error { return u.error }

func inWords(claims jwt.Claims, err error) error {
	at := func(date *jwt.NumericDate) string { return date.Time().UTC().Format(time.RFC3339) }
	for _, w := range []struct {
		is    error
		words string
	}{
		{jwt.ErrExpired, "it expired at " + at(claims.Expiry) + ` ("exp")`},
		{jwt.ErrNotValidYet, "it is not valid before " + at(claims.NotBefore) + ` ("nbf")`},
		{jwt.ErrIssuedInTheFuture, "it is from the future, issued at " + at(claims.IssuedAt) + ` ("iat")`},
		{jwt.ErrInvalidIssuer, `it has another issuer ("iss")`},
		{jwt.ErrInvalidSubject, `it has another subject ("sub")`},
		{jwt.ErrInvalidAudience, `it is for another audience ("aud")`},
		{jwt.ErrInvalidID, `it has another id ("jti")`},
		{jwt.ErrUnmarshalNumericDate, "a time in it is not a number of seconds"},
		{jwt.ErrUnmarshalAudience, `its audience ("aud") is neither text nor a list of texts`},
	} {
		if errors.Is(err, w.is) {
			return &unfit{err, w.words}
		}
	}
	return err
}

// check verifies one signature and returns the payload.
func (v *Verifier) check(ctx context.Context, sig signature) ([]byte, error) {
	alg, kid := sig.header.Algorithm, sig.header.KeyID
	if !slices.Contains(v.opts.Algorithms, alg) {
		return nil, fmt.Errorf("%w: it is signed with %.64q, only %s is allowed", ErrVerify, alg, join(v.opts.Algorithms))
	}
	named, tried := false, false
	for _, k := range v.keys {
		if kid != "" && k.kid != "" && k.kid != kid {
			continue
		}
		named = true
		if !k.fits(alg) {
			continue
		}
		tried = true
		payload, err := k.verify(ctx, sig)
		if err == nil {
			return payload, nil
		}
		if !errors.Is(err, ErrVerify) {
			return nil, err
		}
	}
	switch {
	case !named:
		return nil, fmt.Errorf("%w: none of the %d keys has its kid %.64q", ErrVerify, len(v.keys), kid)
	case !tried:
		return nil, fmt.Errorf("%w: its algorithm %s does not fit the key", ErrVerify, alg)
	}
	return nil, fmt.Errorf("%w: it was altered, or another key signed it", ErrVerify)
}

// verify checks one signature with one key that fits.
func (k verifyKey) verify(ctx context.Context, sig signature) ([]byte, error) {
	if k.mac == nil {
		payload, err := sig.object.Verify(k.pub)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrVerify, err)
		}
		return payload, nil
	}
	err := k.mac.VerifyMAC(ctx, sig.header.Algorithm, []byte(sig.input), sig.value)
	if errors.Is(err, hsmkey.ErrMAC) {
		return nil, fmt.Errorf("%w: %w", ErrVerify, err)
	}
	if err != nil {
		return nil, err
	}
	return sig.object.UnsafePayloadWithoutVerification(), nil
}

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrMalformed, fmt.Errorf(format, args...))
}
