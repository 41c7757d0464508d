package hsmkey

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/asn1"
	"fmt"
	"io"
	"math/big"
)

// Sign implements [crypto.Signer]. It signs a digest that was made with
// opts.HashFunc(), one of SHA-256, SHA-384 and SHA-512; with Ed25519 it signs a
// whole message, and opts.HashFunc() is zero. rand is not used: the HSM has its
// own.
//
// RSA keys sign by PKCS #1 v1.5, or by PSS if opts is a *rsa.PSSOptions.
// [rsa.PSSSaltLengthAuto] gives a salt as long as the hash, like
// [rsa.PSSSaltLengthEqualsHash]: it is what RFC 7518 section 3.5 wants and what
// every verifier takes. ECDSA signatures are ASN.1 DER, as everywhere in Go.
//
// Sign takes no context; [HSMJWK.WithContext] gives it one. A token that has
// only mechanisms which do the hashing themselves cannot sign a digest, which
// is ErrUnsupported; SignMessage works there.
func (k *HSMJWK) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) (signature []byte, err error) {
	s, err := k.schemeFor(opts)
	if err != nil {
		return nil, err
	}
	if s == edDSA {
		return k.sign(k.context(), k.newSigning(s, digest))
	}
	if size := s.id.hash.Size(); len(digest) != size {
		return nil, fmt.Errorf("%w: the digest has %d bytes, %v has %d", ErrInvalid, len(digest), s.id.hash, size)
	}
	return k.encoded(k.sign(k.context(), k.newDigestSigning(s, digest)))
}

// SignMessage implements [crypto.MessageSigner]: like Sign, but it is given the
// message and hashes it by opts.HashFunc(), so that it works on every token.
func (k *HSMJWK) SignMessage(_ io.Reader, message []byte, opts crypto.SignerOpts) (signature []byte, err error) {
	s, err := k.schemeFor(opts)
	if err != nil {
		return nil, err
	}
	return k.encoded(k.sign(k.context(), k.newSigning(s, message)))
}

// schemeFor reads the options of Sign.
func (k *HSMJWK) schemeFor(opts crypto.SignerOpts) (*scheme, error) {
	if opts == nil {
		return nil, fmt.Errorf("%w: signing needs options that name the hash", ErrInvalid)
	}
	if k.material.public == nil {
		return nil, fmt.Errorf("%w: the key with %s is %s and makes no signatures; its codes are for SignJWS",
			ErrUnsupported, k.material, k.material.typ)
	}
	if _, ok := k.material.public.(ed25519.PublicKey); ok {
		if o, ok := opts.(*ed25519.Options); opts.HashFunc() != 0 || ok && o.Context != "" {
			return nil, fmt.Errorf("%w: an Ed25519 key on the HSM signs messages as they are, without Ed25519ph or Ed25519ctx", ErrUnsupported)
		}
		return edDSA, nil
	}
	h, err := hashFor(opts.HashFunc())
	if err != nil {
		return nil, err
	}
	public, ok := k.material.public.(*rsa.PublicKey)
	if !ok {
		return h.ec, nil
	}
	pss, ok := opts.(*rsa.PSSOptions)
	if !ok {
		return h.pkcs1, nil
	}
	salt := pss.SaltLength
	if salt == rsa.PSSSaltLengthEqualsHash || salt == rsa.PSSSaltLengthAuto {
		salt = h.hash.Size()
	}
	// What a key has room for (RFC 8017 section 9.1.1).
	if room := (public.N.BitLen()-1+7)/8 - h.hash.Size() - 2; salt < 0 || salt > room {
		return nil, fmt.Errorf("%w: a PSS salt of %d bytes; a key of %d bits has room for %d", ErrInvalid, salt, public.N.BitLen(), max(room, 0))
	}
	if salt != h.hash.Size() {
		return h.newPSS(salt), nil
	}
	return h.pssHash, nil
}

// encoded gives a signature the form that Go's crypto packages use.
func (k *HSMJWK) encoded(signature []byte, err error) ([]byte, error) {
	if err != nil || curveOf(k.material.public) == nil || curveOf(k.material.public) == curveEd25519 {
		return signature, err
	}
	half := len(signature) / 2
	return asn1.Marshal(struct{ R, S *big.Int }{
		new(big.Int).SetBytes(signature[:half]),
		new(big.Int).SetBytes(signature[half:]),
	})
}
