package hsmkey

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"github.com/miekg/pkcs11"
)

// Import puts a private key or an HMAC secret onto the HSM: *rsa.PrivateKey of
// 2048 bits or more, *ecdsa.PrivateKey on P-256, P-384 or P-521,
// ed25519.PrivateKey, or []byte of at least 32 bytes. On the HSM it is sensitive
// and cannot be extracted. id is the CKA_ID of both halves; nil gives 16 random
// bytes. The key has signed once, and the signature was verified, when Import
// returns.
//
// The error matches ErrExists if a private or secret key has this label or id
// already, or got it from another process meanwhile; ErrUnsupported if the key is of another kind or the token does not
// take it, ErrInvalid if the key is broken. An error leaves nothing behind.
// Import is never repeated on another session.
//
// With balance lists the key goes to every endpoint. One that has this very key
// under the label already is left as it is, so that an import which failed on
// some endpoints can be made again; another key under the label is ErrExists
// there. id nil gives the id that the key has on one of them, else one that
// follows from label and key: all have the same. The error names each endpoint that
// failed, and matches what their failures match; [HSM.ImportEach] tells more.
func (h *HSM) Import(ctx context.Context, label string, key any, id []byte) (*HSMJWK, error) {
	made, _, err := h.ImportEach(ctx, label, key, id)
	return made, err
}

// importers are the recipes for a key from outside.
func importers(key any) (KeyType, []recipe, error) {
	switch key := key.(type) {
	case *rsa.PrivateKey:
		return importRSA(key)
	case *ecdsa.PrivateKey:
		return importECDSA(key)
	case ed25519.PrivateKey:
		if len(key) != ed25519.PrivateKeySize {
			return "", nil, fmt.Errorf("%w: an Ed25519 key of %d bytes", ErrInvalid, len(key))
		}
		if !ed25519.NewKeyFromSeed(key.Seed()).Equal(key) {
			return "", nil, fmt.Errorf("%w: the public key does not belong to the private key", ErrInvalid)
		}
		return importEC(curveEd25519, key.Public(), key.Seed())
	case *ed25519.PrivateKey:
		if key == nil {
			return "", nil, fmt.Errorf("%w: no key", ErrInvalid)
		}
		return importers(*key)
	case []byte:
		return importSecret(key)
	}
	return "", nil, fmt.Errorf("%w: importing a key of type %T", ErrUnsupported, key)
}

func importRSA(key *rsa.PrivateKey) (KeyType, []recipe, error) {
	switch {
	case key == nil || key.N == nil || key.D == nil:
		return "", nil, fmt.Errorf("%w: no key", ErrInvalid)
	case len(key.Primes) != 2 || slices.Contains(key.Primes, nil):
		return "", nil, fmt.Errorf("%w: an RSA key with %d primes", ErrUnsupported, len(key.Primes))
	case key.N.BitLen() < minRSABits:
		return "", nil, fmt.Errorf("%w: an RSA key of %d bits; JOSE wants %d or more (RFC 7518 section 3.3)", ErrUnsupported, key.N.BitLen(), minRSABits)
	}
	if err := key.Validate(); err != nil {
		return "", nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	p, q := key.Primes[0], key.Primes[1]
	one := big.NewInt(1)
	dp := new(big.Int).Mod(key.D, new(big.Int).Sub(p, one))
	dq := new(big.Int).Mod(key.D, new(big.Int).Sub(q, one))
	qinv := new(big.Int).ModInverse(q, p)
	e := big.NewInt(int64(key.E)).Bytes()
	typ, err := typeOf(&key.PublicKey)
	return typ, []recipe{func(k *maker) error {
		return k.store(
			append(k.publicTemplate(),
				attr(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
				attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA),
				attr(pkcs11.CKA_ENCRYPT, true),
				attr(pkcs11.CKA_MODULUS, key.N.Bytes()),
				attr(pkcs11.CKA_PUBLIC_EXPONENT, e)),
			append(k.privateTemplate(),
				attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
				attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA),
				attr(pkcs11.CKA_DECRYPT, true),
				attr(pkcs11.CKA_MODULUS, key.N.Bytes()),
				attr(pkcs11.CKA_PUBLIC_EXPONENT, e),
				attr(pkcs11.CKA_PRIVATE_EXPONENT, key.D.Bytes()),
				attr(pkcs11.CKA_PRIME_1, p.Bytes()),
				attr(pkcs11.CKA_PRIME_2, q.Bytes()),
				attr(pkcs11.CKA_EXPONENT_1, dp.Bytes()),
				attr(pkcs11.CKA_EXPONENT_2, dq.Bytes()),
				attr(pkcs11.CKA_COEFFICIENT, qinv.Bytes())))
	}}, err
}

func importECDSA(key *ecdsa.PrivateKey) (KeyType, []recipe, error) {
	if key == nil || key.Curve == nil {
		return "", nil, fmt.Errorf("%w: no key", ErrInvalid)
	}
	c := curveOf(&key.PublicKey)
	if c == nil {
		return "", nil, fmt.Errorf("%w: an EC key on %s; JOSE signs on P-256, P-384 and P-521", ErrUnsupported, key.Params().Name)
	}
	if key.D == nil || key.X == nil || key.Y == nil { //nolint:staticcheck // Bytes panics without them
		return "", nil, fmt.Errorf("%w: half an EC key", ErrInvalid)
	}
	secret, err := key.Bytes() // as long as the curve's order
	if err != nil {
		return "", nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	whole, err := ecdsa.ParseRawPrivateKey(key.Curve, secret)
	if err != nil || !whole.PublicKey.Equal(&key.PublicKey) {
		return "", nil, fmt.Errorf("%w: the public key does not belong to the private key", ErrInvalid)
	}
	return importEC(c, whole.Public(), secret)
}

// importEC has a recipe for each way in which modules want curve and point.
func importEC(c *curve, public crypto.PublicKey, secret []byte) (KeyType, []recipe, error) {
	bare, err := point(public)
	if err != nil {
		return "", nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	wrapped, err := wrapPoint(bare)
	if err != nil {
		return "", nil, err
	}
	keyType := uint(pkcs11.CKK_EC)
	if c == curveEd25519 {
		keyType = ckkECEdwards
	}
	var recipes []recipe
	for _, params := range [][]byte{c.params, c.name} {
		for _, point := range [][]byte{wrapped, bare} {
			if params == nil {
				continue
			}
			recipes = append(recipes, func(k *maker) error {
				return k.store(
					append(k.publicTemplate(),
						attr(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
						attr(pkcs11.CKA_KEY_TYPE, keyType),
						attr(pkcs11.CKA_EC_PARAMS, params),
						attr(pkcs11.CKA_EC_POINT, point)),
					append(k.privateTemplate(),
						attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
						attr(pkcs11.CKA_KEY_TYPE, keyType),
						attr(pkcs11.CKA_EC_PARAMS, params),
						attr(pkcs11.CKA_VALUE, secret)))
			})
		}
	}
	return c.typ, recipes, nil
}

func importSecret(secret []byte) (KeyType, []recipe, error) {
	if size := hmacs[0].size; uint(len(secret)) < size {
		return "", nil, fmt.Errorf("%w: an HMAC secret of %d bytes; JOSE wants %d or more (RFC 7518 section 3.2)", ErrUnsupported, len(secret), size)
	}
	secret = bytes.Clone(secret)
	store := func(keyType uint) recipe {
		return func(k *maker) error {
			return k.storeOne(append(k.secretTemplate(keyType), attr(pkcs11.CKA_VALUE, secret)))
		}
	}
	recipes := []recipe{store(ckkGenericSecret)}
	for i := len(hmacs) - 1; i >= 0; i-- {
		if uint(len(secret)) >= hmacs[i].size {
			recipes = append(recipes, store(hmacs[i].keyType))
			break
		}
	}
	return hmacType(uint(len(secret))), recipes, nil
}

// store creates both halves of a key.
func (k *maker) store(public, private []*pkcs11.Attribute) error {
	if err := k.storeOne(public); err != nil {
		return err
	}
	return k.storeOne(private)
}

func (k *maker) storeOne(template []*pkcs11.Attribute) error {
	handle, err := k.module.CreateObject(k.session, template)
	if err == nil {
		k.made = append(k.made, handle)
	}
	return err
}

// proveSignature has a new key sign, and verifies the signature with its public
// key: modules exist that take a key whose attributes they misread.
func proveSignature(t token, k *material, handle pkcs11.ObjectHandle) error {
	if k.public == nil {
		return nil // its mark was made with it
	}
	message := []byte(markMessage)
	key := &HSMJWK{material: k}
	s := schemes[k.algorithms[0]]
	j := key.newSigning(s, message)
	var failed error
	for i := range s.ways {
		w := &s.ways[i]
		signature, err := t.module.SignSingle(nil, t.session, w.mechanism, handle, j.data(w), j.size)
		if err != nil {
			failed = errors.Join(failed, &refusal{w.name, err})
			continue
		}
		if !verifies(k.public, message, signature) {
			return fmt.Errorf("%w: %s took the key and signs wrongly with it", ErrUnsupported, t.name)
		}
		return nil
	}
	if refuses(failed) {
		return fmt.Errorf("%w: %s took the key but does not sign with it: %w", ErrUnsupported, t.name, failed)
	}
	return failed
}

// verifies checks a signature by the default algorithm of a public key.
func verifies(public crypto.PublicKey, message, signature []byte) bool {
	switch public := public.(type) {
	case *rsa.PublicKey:
		digest := sha256.Sum256(message)
		return rsa.VerifyPKCS1v15(public, crypto.SHA256, digest[:], signature) == nil
	case *ecdsa.PublicKey:
		var digest []byte
		switch curveOf(public) {
		case curveP256:
			d := sha256.Sum256(message)
			digest = d[:]
		case curveP384:
			d := sha512.Sum384(message)
			digest = d[:]
		default:
			d := sha512.Sum512(message)
			digest = d[:]
		}
		half := len(signature) / 2
		return ecdsa.Verify(public, digest, new(big.Int).SetBytes(signature[:half]), new(big.Int).SetBytes(signature[half:]))
	case ed25519.PublicKey:
		return ed25519.Verify(public, message, signature)
	}
	return false
}
