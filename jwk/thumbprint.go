package jwk

import (
	"crypto"
	_ "crypto/sha256" // for crypto.SHA256
	"encoding/base64"
	"encoding/hex"
	"fmt"

	"github.com/go-jose/go-jose/v4"

	"github.com/hsmkey/hsmkey"
)

// Thumbprint returns the JWK thumbprint of a public key: SHA-256 over its
// required members in canonical form (RFC 7638, for Ed25519 RFC 8037 section 2),
// in base64url without padding. Errors are those of [FromPublic].
func Thumbprint(pub crypto.PublicKey) (string, error) {
	if _, err := algorithms(pub); err != nil {
		return "", err
	}
	key := jose.JSONWebKey{Key: pub}
	sum, err := key.Thumbprint(crypto.SHA256)
	if err != nil {
		return "", fmt.Errorf("%w: %w", hsmkey.ErrUnsupported, err)
	}
	return base64.RawURLEncoding.EncodeToString(sum), nil
}

// KeyID returns the default kid of a key on the HSM: its thumbprint. An HMAC key
// has none, because its secret cannot be read; its kid is its CKA_ID in
// hexadecimal digits or, if it has no id, its label. A nil key is
// [hsmkey.ErrConfig].
func KeyID(key *hsmkey.HSMJWK) (string, error) {
	if key == nil {
		return "", errNoKey
	}
	if pub := key.Public(); pub != nil {
		return Thumbprint(pub)
	}
	if id := key.ID(); len(id) > 0 {
		return hex.EncodeToString(id), nil
	}
	return key.Label(), nil
}
