package hsmkey_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
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
		if !ed25519.Verify(key.Public().(ed25519.PublicKey), input, signature) {
			return fmt.Errorf("the %s signature is wrong", algorithm)
		}
		return nil
	}
	hash := hashes[string(algorithm[2:])]
	digest := hash.New()
	digest.Write(input)
	switch algorithm[:2] {
	case "RS":
		return rsa.VerifyPKCS1v15(key.Public().(*rsa.PublicKey), hash, digest.Sum(nil), signature)
	case "PS":
		return rsa.VerifyPSS(key.Public().(*rsa.PublicKey), hash, digest.Sum(nil), signature,
			&rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
	case "ES":
		public := key.Public().(*ecdsa.PublicKey)
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
	comparable, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && comparable.Equal(b)
}

// verifyASN1 checks an ECDSA signature as Go's crypto packages make it.
func verifyASN1(key *hsmkey.HSMJWK, hash crypto.Hash, message, signature []byte) bool {
	digest := hash.New()
	digest.Write(message)
	return ecdsa.VerifyASN1(key.Public().(*ecdsa.PublicKey), digest.Sum(nil), signature)
}
