package hsmkey_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"errors"
	"fmt"
	"math/big"

	"github.com/hsmkey/hsmkey"
)

// hashes are those that the last three digits of an algorithm name.
var hashes = map[string]crypto.Hash{"256": crypto.SHA256, "384": crypto.SHA384, "512": crypto.SHA512}

// verify checks a JWS signature value by RFC 7518 section 3, with Go's own
// cryptography. PSS must have a salt exactly as long as the hash.
func verify(key *hsmkey.HSMJWK, algorithm hsmkey.Algorithm, input, signature []byte) error {
	if algorithm == hsmkey.EdDSA {
		if !ed25519.Verify(as[ed25519.PublicKey](key.Public()), input, signature) {
			return fmt.Errorf("the %s signature is wrong", algorithm)
		}
		return nil
	}
	hash := hashes[string(algorithm[2:])]
	digest := hash.New()
	digest.Write(input)
	switch algorithm[:2] {
	case "RS":
		return rsa.VerifyPKCS1v15(as[*rsa.PublicKey](key.Public()), hash, digest.Sum(nil), signature)
	case "PS":
		return rsa.VerifyPSS(as[*rsa.PublicKey](key.Public()), hash, digest.Sum(nil), signature,
			&rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
	case "ES":
		public := as[*ecdsa.PublicKey](key.Public())
		half := (public.Params().BitSize + 7) / 8
		if len(signature) != 2*half {
			return fmt.Errorf("the %s signature has %d bytes, want %d", algorithm, len(signature), 2*half)
		}
		r, s := new(big.Int).SetBytes(signature[:half]), new(big.Int).SetBytes(signature[half:])
		if !ecdsa.Verify(public, digest.Sum(nil), r, s) {
			return fmt.Errorf("the %s signature is wrong", algorithm)
		}
		return nil
	}
	return key.VerifyMAC(context.Background(), algorithm, input, signature)
}

// samePublic compares public keys.
func samePublic(a, b crypto.PublicKey) bool {
	key, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && key.Equal(b)
}

// verifyASN1 checks an ECDSA signature as Go's crypto packages make it.
func verifyASN1(key *hsmkey.HSMJWK, hash crypto.Hash, message, signature []byte) bool {
	digest := hash.New()
	digest.Write(message)
	return ecdsa.VerifyASN1(as[*ecdsa.PublicKey](key.Public()), digest.Sum(nil), signature)
}

// verifyDigest checks a signature of a digest that stands for one of SHA-256.
func verifyDigest(public crypto.PublicKey, digest, signature []byte) error {
	if key, ok := public.(*rsa.PublicKey); ok {
		return rsa.VerifyPKCS1v15(key, crypto.SHA256, digest, signature)
	}
	if !ecdsa.VerifyASN1(as[*ecdsa.PublicKey](public), digest, signature) {
		return errors.New("the signature is wrong")
	}
	return nil
}

// as is a type assertion that fails with both types' names.
func as[T any](v any) T {
	t, ok := v.(T)
	if !ok {
		panic(fmt.Sprintf("%T is not %T", v, t))
	}
	return t
}
