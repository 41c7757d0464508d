package jws

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha256" // for crypto.SHA256
	_ "crypto/sha512" // for crypto.SHA384 and crypto.SHA512
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"

	"github.com/hsmkey/hsmkey"
)

// hashes of the algorithms (RFC 7518, section 3.1). EdDSA hashes by itself.
var hashes = map[hsmkey.Algorithm]crypto.Hash{
	hsmkey.RS256: crypto.SHA256, hsmkey.RS384: crypto.SHA384, hsmkey.RS512: crypto.SHA512,
	hsmkey.PS256: crypto.SHA256, hsmkey.PS384: crypto.SHA384, hsmkey.PS512: crypto.SHA512,
	hsmkey.ES256: crypto.SHA256, hsmkey.ES384: crypto.SHA384, hsmkey.ES512: crypto.SHA512,
	hsmkey.HS256: crypto.SHA256, hsmkey.HS384: crypto.SHA384, hsmkey.HS512: crypto.SHA512,
	hsmkey.EdDSA: crypto.Hash(0),
}

// foreign signs with a crypto.Signer that is not ours.
func foreign(signer crypto.Signer, pub crypto.PublicKey, alg hsmkey.Algorithm) signFunc {
	var opts crypto.SignerOpts = hashes[alg]
	switch alg {
	case hsmkey.PS256, hsmkey.PS384, hsmkey.PS512:
		opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: hashes[alg]}
	}
	size := signatureSize(pub)
	return func(ctx context.Context, input []byte) ([]byte, error) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		sig, err := crypto.SignMessage(signer, rand.Reader, input, opts)
		if err != nil {
			return nil, fmt.Errorf("sign with %T: %w", signer, err)
		}
		if pub, ok := pub.(*ecdsa.PublicKey); ok {
			if sig, err = concatenated(pub, sig); err != nil {
				return nil, fmt.Errorf("sign with %T: %w", signer, err)
			}
		}
		if len(sig) != size {
			return nil, fmt.Errorf("sign with %T: it returned a signature of %d bytes, a %s signature by this key has %d", signer, len(sig), alg, size)
		}
		return sig, nil
	}
}

// signatureSize is the length of a signature value by the key (RFC 7518, sections
// 3.3 to 3.5, RFC 8037, section 3.1).
func signatureSize(pub crypto.PublicKey) int {
	switch pub := pub.(type) {
	case *rsa.PublicKey:
		return pub.Size()
	case *ecdsa.PublicKey:
		return 2 * coordinateSize(pub)
	default:
		return ed25519.SignatureSize
	}
}

func coordinateSize(pub *ecdsa.PublicKey) int {
	return (pub.Curve.Params().BitSize + 7) / 8
}

// concatenated converts an ECDSA signature from DER, as crypto.Signers return it,
// to R || S, as JOSE writes it (RFC 7518, section 3.4).
func concatenated(pub *ecdsa.PublicKey, der []byte) ([]byte, error) {
	var sig struct{ R, S *big.Int }
	if rest, err := asn1.Unmarshal(der, &sig); err != nil || len(rest) != 0 {
		return nil, errors.Join(errors.New("it returned no ECDSA signature in DER"), err)
	}
	for _, n := range []*big.Int{sig.R, sig.S} {
		if n.Sign() <= 0 || n.Cmp(pub.Curve.Params().N) >= 0 {
			return nil, errors.New("it returned an ECDSA signature that is out of range")
		}
	}
	size := coordinateSize(pub)
	out := make([]byte, 2*size)
	sig.R.FillBytes(out[:size])
	sig.S.FillBytes(out[size:])
	return out, nil
}
