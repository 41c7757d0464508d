package hsmkey

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"fmt"
	"slices"
	"strings"
)

// KeyType is the kind and size of a key, in the words of the command line. A
// key that was made elsewhere may be of another size than those listed, such as
// "rsa:1024" or "hmac:320"; it can be read, but not generated.
type KeyType string

// The types of keys that [HSM.Generate] makes.
const (
	RSA2048 KeyType = "rsa:2048"
	RSA3072 KeyType = "rsa:3072"
	RSA4096 KeyType = "rsa:4096"
	P256    KeyType = "ec:P-256"
	P384    KeyType = "ec:P-384"
	P521    KeyType = "ec:P-521"
	Ed25519 KeyType = "ed25519"
	HMAC256 KeyType = "hmac:256"
	HMAC384 KeyType = "hmac:384"
	HMAC512 KeyType = "hmac:512"
)

// KeyTypes lists the types that can be generated.
func KeyTypes() []KeyType {
	return []KeyType{RSA2048, RSA3072, RSA4096, P256, P384, P521, Ed25519, HMAC256, HMAC384, HMAC512}
}

// ParseKeyType reads one of [KeyTypes], in upper or lower case. Anything else
// is ErrInvalid.
func ParseKeyType(s string) (KeyType, error) {
	for _, t := range KeyTypes() {
		if strings.EqualFold(s, string(t)) {
			return t, nil
		}
	}
	var names []string
	for _, t := range KeyTypes() {
		names = append(names, string(t))
	}
	return "", fmt.Errorf("%w: key type %q; there is %s", ErrInvalid, s, strings.Join(names, ", "))
}

// String returns the type as [ParseKeyType] reads it.
func (t KeyType) String() string { return string(t) }

// Algorithm is a signature or MAC algorithm of JOSE, by its name in the "alg"
// header (RFC 7518 section 3.1, RFC 8037 section 3.1).
type Algorithm string

// The algorithms that keys on the HSM sign with.
const (
	RS256 Algorithm = "RS256"
	RS384 Algorithm = "RS384"
	RS512 Algorithm = "RS512"
	PS256 Algorithm = "PS256"
	PS384 Algorithm = "PS384"
	PS512 Algorithm = "PS512"
	ES256 Algorithm = "ES256"
	ES384 Algorithm = "ES384"
	ES512 Algorithm = "ES512"
	EdDSA Algorithm = "EdDSA"
	HS256 Algorithm = "HS256"
	HS384 Algorithm = "HS384"
	HS512 Algorithm = "HS512"
)

// minRSABits is the smallest RSA key that JOSE signs with (RFC 7518 sections
// 3.3 and 3.5).
const minRSABits = 2048

// typeOf names the type of a public key.
func typeOf(public crypto.PublicKey) (KeyType, error) {
	if key, ok := public.(*rsa.PublicKey); ok {
		return KeyType(fmt.Sprintf("rsa:%d", key.N.BitLen())), nil
	}
	if c := curveOf(public); c != nil {
		return c.typ, nil
	}
	return "", fmt.Errorf("%w: a public key of type %T", ErrUnsupported, public)
}

// hmacType names the type of a secret of so many bytes.
func hmacType(size uint) KeyType { return KeyType(fmt.Sprintf("hmac:%d", 8*size)) }

// publicAlgorithms lists what the private key to a public key signs with, the
// default first. A key of ECDSA has one algorithm, that of its curve; an RSA key
// that is too short for JOSE has none.
func publicAlgorithms(public crypto.PublicKey) []Algorithm {
	switch public := public.(type) {
	case *rsa.PublicKey:
		if public.N.BitLen() >= minRSABits {
			return []Algorithm{RS256, RS384, RS512, PS256, PS384, PS512}
		}
	case *ecdsa.PublicKey:
		switch curveOf(public) {
		case curveP256:
			return []Algorithm{ES256}
		case curveP384:
			return []Algorithm{ES384}
		case curveP521:
			return []Algorithm{ES512}
		}
	case ed25519.PublicKey:
		return []Algorithm{EdDSA}
	}
	return nil
}

// hmacs are the HMAC algorithms by the number of bytes that their key must have
// at least (RFC 7518 section 3.2).
var hmacs = []struct {
	algorithm Algorithm
	typ       KeyType
	size      uint
	keyType   uint // CKK_*_HMAC, for modules that tie a key to its hash
}{
	{HS256, HMAC256, 32, ckkSHA256HMAC},
	{HS384, HMAC384, 48, ckkSHA384HMAC},
	{HS512, HMAC512, 64, ckkSHA512HMAC},
}

// hmacAlgorithms lists what a secret of so many bytes signs with; the longest
// hash that it suits is the default. keyType may tie it to one hash.
func hmacAlgorithms(keyType, size uint) []Algorithm {
	var list []Algorithm
	for _, h := range hmacs {
		if size >= h.size && (keyType == ckkGenericSecret || keyType == h.keyType) {
			list = append(list, h.algorithm)
		}
	}
	slices.Reverse(list)
	return list
}
