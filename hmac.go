package hsmkey

import (
	"context"
	"crypto/hmac"
	"fmt"
)

// VerifyMAC checks the code of a JWS signing input under an HMAC key: the HSM
// computes it again, and the two are compared in constant time. The error
// matches ErrMAC if they differ; any other error says nothing about the code.
func (k *HSMJWK) VerifyMAC(ctx context.Context, algorithm Algorithm, signingInput, mac []byte) error {
	if k.material.public != nil {
		return fmt.Errorf("%w: the key with %s is %s and makes signatures, which its public key verifies",
			ErrUnsupported, k.material, k.material.typ)
	}
	want, err := k.SignJWS(ctx, algorithm, signingInput)
	if err != nil {
		return err
	}
	if !hmac.Equal(want, mac) {
		return ErrMAC
	}
	return nil
}
