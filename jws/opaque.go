package jws

import (
	"bytes"
	"context"
	"fmt"

	"github.com/go-jose/go-jose/v4"

	"github.com/hsmkey/hsmkey"
)

// opaque is how go-jose sees our keys. It offers no public key: the kid is among
// the extra headers, which works for HMAC keys too, and go-jose would use the
// public key for nothing else.
type opaque struct {
	alg  jose.SignatureAlgorithm
	sign signFunc
}

var _ jose.OpaqueSigner = opaque{}

func (o opaque) Public() *jose.JSONWebKey        { return nil }
func (o opaque) Algs() []jose.SignatureAlgorithm { return []jose.SignatureAlgorithm{o.alg} }

func (o opaque) SignPayload(payload []byte, _ jose.SignatureAlgorithm) ([]byte, error) {
	return o.sign(context.Background(), payload)
}

// joseSigner returns the go-jose signer that writes these headers.
func joseSigner(alg hsmkey.Algorithm, headers map[jose.HeaderKey]any, sign signFunc) (jose.Signer, error) {
	key := jose.SigningKey{
		Algorithm: jose.SignatureAlgorithm(alg),
		Key:       opaque{jose.SignatureAlgorithm(alg), sign},
	}
	signer, err := jose.NewSigner(key, &jose.SignerOptions{ExtraHeaders: headers})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", hsmkey.ErrConfig, err)
	}
	return signer, nil
}

// encodedHeader returns the protected header as it stands in a compact token,
// with the dot that ends it. go-jose itself writes it, around a signature that
// nobody sees, so that our tokens are the same bytes as go-jose's.
func encodedHeader(alg hsmkey.Algorithm, headers map[jose.HeaderKey]any) ([]byte, error) {
	none := func(context.Context, []byte) ([]byte, error) { return nil, nil }
	signer, err := joseSigner(alg, headers, none)
	if err != nil {
		return nil, err
	}
	obj, err := signer.Sign(nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", hsmkey.ErrConfig, err)
	}
	token, err := obj.CompactSerialize()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", hsmkey.ErrConfig, err)
	}
	header, _, _ := bytes.Cut([]byte(token), []byte("."))
	return append(header, '.'), nil
}
