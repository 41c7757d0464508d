package jwk

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	stdjson "encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"

	"github.com/hsmkey/hsmkey"
)

// ErrPrivate means that a private or symmetric key was given, or found in a JWK,
// where only a public key may be. The error never contains the key.
var ErrPrivate = errors.New("private key where a public key is expected")

var errNoKey = fmt.Errorf("%w: there is no key", hsmkey.ErrConfig)

// Values of the "use" and "key_ops" members of signing keys (RFC 7517, sections
// 4.2 and 4.3).
const (
	useSignature = "sig"
	opVerify     = "verify"
)

// Key is the public half of a signing key as a JSON Web Key (RFC 7517). Make one
// with [Public], [FromPublic] or json.Unmarshal; the zero Key is none and cannot
// be marshaled.
type Key struct {
	key jose.JSONWebKey
	ops []string // key_ops, for which go-jose's type has no field
}

// Option changes what [Public] and [FromPublic] put into a key.
type Option func(*options)

type options struct {
	keyID     *string
	algorithm hsmkey.Algorithm
}

// WithKeyID sets the kid; empty: the JWK has none. Default: the thumbprint.
func WithKeyID(kid string) Option {
	return func(o *options) { o.keyID = &kid }
}

// WithAlgorithm sets the alg, which tells verifiers to accept no other with this
// key; empty: the JWK has none. Default: the key's default algorithm (RS256 for
// RSA).
func WithAlgorithm(alg hsmkey.Algorithm) Option {
	return func(o *options) { o.algorithm = alg }
}

// Public returns the JWK of a key on the HSM. It fails with
// [hsmkey.ErrUnsupported] for an HMAC key, which has no public half, and for an
// algorithm that the key cannot do.
func Public(key *hsmkey.HSMJWK, opts ...Option) (Key, error) {
	if key == nil {
		return Key{}, errNoKey
	}
	pub := key.Public()
	if pub == nil {
		return Key{}, fmt.Errorf("%w: key %q is an HMAC key, which has no public half to publish", hsmkey.ErrUnsupported, key.Label())
	}
	return FromPublic(pub, opts...)
}

// FromPublic returns the JWK of any public key: *rsa.PublicKey, *ecdsa.PublicKey
// on P-256, P-384 or P-521, or ed25519.PublicKey. Other types and invalid keys
// fail with [hsmkey.ErrUnsupported], private and symmetric ones with [ErrPrivate].
func FromPublic(pub crypto.PublicKey, opts ...Option) (Key, error) {
	algs, err := algorithms(pub)
	if err != nil {
		return Key{}, err
	}
	o := options{algorithm: algs[0]}
	for _, opt := range opts {
		opt(&o)
	}
	if o.algorithm != "" && !slices.Contains(algs, o.algorithm) {
		return Key{}, fmt.Errorf("%w: the key cannot do %s, only %v", hsmkey.ErrUnsupported, o.algorithm, algs)
	}
	k := Key{
		key: jose.JSONWebKey{Key: pub, Algorithm: string(o.algorithm), Use: useSignature},
		ops: []string{opVerify},
	}
	if o.keyID != nil {
		k.key.KeyID = *o.keyID
	} else if k.key.KeyID, err = Thumbprint(pub); err != nil {
		return Key{}, err
	}
	return k, nil
}

// KeyID returns the kid, empty if the JWK has none.
func (k Key) KeyID() string { return k.key.KeyID }

// Algorithm returns the alg, empty if the JWK has none.
func (k Key) Algorithm() hsmkey.Algorithm { return hsmkey.Algorithm(k.key.Algorithm) }

// PublicKey returns the key itself: *rsa.PublicKey, *ecdsa.PublicKey or
// ed25519.PublicKey.
func (k Key) PublicKey() crypto.PublicKey { return k.key.Key }

// Jose returns the key as go-jose's type, for use with that library. It has no
// key_ops, for which that type has no place.
func (k Key) Jose() jose.JSONWebKey { return k.key }

// Algorithms returns the algorithms whose signatures the key may verify: those
// that fit its type, as far as its alg, use and key_ops members, where present,
// allow them (RFC 7517, section 4). The default comes first.
func (k Key) Algorithms() []hsmkey.Algorithm {
	algs, err := algorithms(k.key.Key)
	if err != nil ||
		k.key.Use != "" && k.key.Use != useSignature ||
		len(k.ops) > 0 && !slices.Contains(k.ops, opVerify) {
		return nil
	}
	if only := k.Algorithm(); only != "" {
		if !slices.Contains(algs, only) {
			return nil
		}
		return []hsmkey.Algorithm{only}
	}
	return algs
}

// MarshalJSON writes the JWK.
func (k Key) MarshalJSON() ([]byte, error) {
	if _, err := algorithms(k.key.Key); err != nil {
		return nil, err
	}
	out, err := k.key.MarshalJSON()
	if err != nil || len(k.ops) == 0 {
		return out, err
	}
	ops, err := stdjson.Marshal(k.ops)
	if err != nil {
		return nil, err
	}
	// go-jose wrote an object with at least "kty" in it: another member goes
	// before its closing brace.
	out = append(out[:len(out)-1], `,"key_ops":`...)
	out = append(out, ops...)
	return append(out, '}'), nil
}

// UnmarshalJSON reads a public JWK. It fails with [ErrPrivate] for one that has
// private members (RFC 7518, section 6), with [hsmkey.ErrUnsupported] for a type
// of key that is not known here, and with [hsmkey.ErrConfig] for anything that
// is no JWK. Duplicate members are refused.
func (k *Key) UnmarshalJSON(data []byte) error {
	var members map[string]stdjson.RawMessage
	if err := json.Unmarshal(data, &members); err != nil {
		return fmt.Errorf("%w: no JSON Web Key: %w", hsmkey.ErrConfig, err)
	}
	for _, name := range privateMembers {
		if _, found := members[name]; found {
			return fmt.Errorf("%w: the JWK has the member %q; publish the public key only, and replace this key if it was public", ErrPrivate, name)
		}
	}
	var read Key
	if ops, found := members["key_ops"]; found {
		if err := json.Unmarshal(ops, &read.ops); err != nil {
			return fmt.Errorf("%w: no JSON Web Key: key_ops: %w", hsmkey.ErrConfig, err)
		}
	}
	if err := read.key.UnmarshalJSON(data); err != nil {
		if errors.Is(err, jose.ErrUnsupportedKeyType) {
			return fmt.Errorf("%w: JWK with kty %s", hsmkey.ErrUnsupported, members["kty"])
		}
		return fmt.Errorf("%w: no JSON Web Key: %w", hsmkey.ErrConfig, err)
	}
	if _, err := algorithms(read.key.Key); err != nil {
		return err
	}
	*k = read
	return nil
}

// privateMembers are those that hold, or help to compute, a private or symmetric
// key: RFC 7518, sections 6.2.2, 6.3.2 and 6.4, RFC 8037, section 2, RFC 9964.
var privateMembers = []string{"d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv"}

// minRSABits is the smallest RSA key that JOSE allows (RFC 7518, sections 3.3
// and 3.5).
const minRSABits = 2048

// algorithms checks a public key and returns the signature algorithms that it
// fits, the default first.
func algorithms(pub crypto.PublicKey) ([]hsmkey.Algorithm, error) {
	invalid := func(what string) ([]hsmkey.Algorithm, error) {
		return nil, fmt.Errorf("%w: %s", hsmkey.ErrUnsupported, what)
	}
	switch pub := pub.(type) {
	case *rsa.PublicKey:
		if pub == nil || pub.N == nil || pub.N.Sign() <= 0 || pub.E < 2 {
			return invalid("the RSA key has no modulus or exponent")
		}
		if pub.N.BitLen() < minRSABits {
			return invalid(fmt.Sprintf("the RSA key has %d bits, JOSE demands at least %d", pub.N.BitLen(), minRSABits))
		}
		return []hsmkey.Algorithm{hsmkey.RS256, hsmkey.RS384, hsmkey.RS512, hsmkey.PS256, hsmkey.PS384, hsmkey.PS512}, nil
	case *ecdsa.PublicKey:
		if pub == nil || pub.Curve == nil {
			return invalid("the EC key has no curve")
		}
		if _, err := pub.Bytes(); err != nil {
			return invalid("the EC key is no point on a curve that JOSE knows")
		}
		switch pub.Curve {
		case elliptic.P256():
			return []hsmkey.Algorithm{hsmkey.ES256}, nil
		case elliptic.P384():
			return []hsmkey.Algorithm{hsmkey.ES384}, nil
		case elliptic.P521():
			return []hsmkey.Algorithm{hsmkey.ES512}, nil
		}
		return invalid(fmt.Sprintf("JOSE has no algorithm for the curve %s", pub.Curve.Params().Name))
	case ed25519.PublicKey:
		if len(pub) != ed25519.PublicKeySize {
			return invalid("the Ed25519 key has the wrong length")
		}
		return []hsmkey.Algorithm{hsmkey.EdDSA}, nil
	case nil:
		return invalid("there is no public key")
	case interface{ Public() crypto.PublicKey }, []byte:
		return nil, fmt.Errorf("%w: %T", ErrPrivate, pub)
	default:
		return invalid(fmt.Sprintf("no JWK for a key of type %T", pub))
	}
}
