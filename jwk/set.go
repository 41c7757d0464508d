package jwk

import (
	"crypto"
	stdjson "encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"

	"github.com/hsmkey/hsmkey"
)

// Set is a JWK Set (RFC 7517, section 5). The zero Set is empty.
type Set struct {
	keys []Key
}

// NewSet returns the set of the given keys, in their order. A key that is given
// twice is in it once. Two different keys with one kid are [hsmkey.ErrConfig]: a
// verifier could not tell which of them a token means.
func NewSet(keys ...Key) (Set, error) {
	set := Set{}
	thumbprints := make(map[string]string) // by kid
	for _, k := range keys {
		thumbprint, err := Thumbprint(k.key.Key)
		if err != nil {
			return Set{}, err
		}
		if other, found := thumbprints[k.KeyID()]; found && other != thumbprint && k.KeyID() != "" {
			return Set{}, fmt.Errorf("%w: two different keys have the kid %q", hsmkey.ErrConfig, k.KeyID())
		}
		thumbprints[k.KeyID()] = thumbprint
		if !slices.ContainsFunc(set.keys, k.equal) {
			set.keys = append(set.keys, k)
		}
	}
	return set, nil
}

// equal reports whether two JWKs say the same.
func (k Key) equal(other Key) bool {
	pub, ok := k.key.Key.(interface{ Equal(crypto.PublicKey) bool })
	return ok && pub.Equal(other.key.Key) &&
		k.KeyID() == other.KeyID() && k.Algorithm() == other.Algorithm() &&
		k.key.Use == other.key.Use && slices.Equal(k.ops, other.ops)
}

// ParseSet reads what others publish: a JWK Set, or a single JWK, which becomes a
// set of one.
//
// As RFC 7517 section 5 wants, keys of a type that is not known here, without
// required members or with values out of range are left out; several keys with
// one kid are kept. A set with a private or symmetric key in it is refused as a
// whole with [ErrPrivate]: somebody published a secret. Anything that is no JWK
// Set fails with [hsmkey.ErrConfig]. The caller limits the length of data.
func ParseSet(data []byte) (Set, error) {
	var members struct {
		Keys *[]stdjson.RawMessage `json:"keys"`
		Type string                `json:"kty"`
	}
	if err := json.Unmarshal(data, &members); err != nil {
		return Set{}, fmt.Errorf("%w: no JWK Set: %w", hsmkey.ErrConfig, err)
	}
	if members.Keys == nil {
		if members.Type == "" {
			return Set{}, fmt.Errorf(`%w: no JWK Set: an object with the member "keys" is expected`, hsmkey.ErrConfig)
		}
		var k Key
		if err := k.UnmarshalJSON(data); err != nil {
			return Set{}, err
		}
		return Set{keys: []Key{k}}, nil
	}
	set := Set{}
	for _, raw := range *members.Keys {
		var k Key
		err := k.UnmarshalJSON(raw)
		if errors.Is(err, ErrPrivate) {
			return Set{}, err
		}
		if err == nil {
			set.keys = append(set.keys, k)
		}
	}
	return set, nil
}

// Keys returns the keys in their order.
func (s Set) Keys() []Key { return slices.Clone(s.keys) }

// Jose returns the set as go-jose's type, for use with that library.
func (s Set) Jose() jose.JSONWebKeySet {
	out := jose.JSONWebKeySet{Keys: make([]jose.JSONWebKey, len(s.keys))}
	for i, k := range s.keys {
		out.Keys[i] = k.Jose()
	}
	return out
}

// MarshalJSON writes {"keys":[…]}.
func (s Set) MarshalJSON() ([]byte, error) {
	keys := s.keys
	if keys == nil {
		keys = []Key{} // "keys" is an array even when it is empty
	}
	return stdjson.Marshal(map[string][]Key{"keys": keys})
}

// UnmarshalJSON is [ParseSet] for use by encoding/json.
func (s *Set) UnmarshalJSON(data []byte) error {
	set, err := ParseSet(data)
	if err == nil {
		*s = set
	}
	return err
}
