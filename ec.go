package hsmkey

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"encoding/asn1"
	"fmt"
)

// curve is an elliptic curve that JOSE has an algorithm for (RFC 7518 section
// 3.4, RFC 8037 section 3.1).
type curve struct {
	typ      KeyType
	params   []byte                // CKA_EC_PARAMS: the DER of the object identifier
	name     []byte                // CKA_EC_PARAMS by name, a DER PrintableString; nil: none
	elliptic func() elliptic.Curve // nil: not of that kind. Making one takes time
	size     int                   // bytes of a coordinate, or of an Ed25519 key
}

var (
	curveP256 = &curve{
		typ:      P256,
		params:   []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}, // 1.2.840.10045.3.1.7
		elliptic: elliptic.P256, size: 32,
	}
	curveP384 = &curve{
		typ:      P384,
		params:   []byte{0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22}, // 1.3.132.0.34
		elliptic: elliptic.P384, size: 48,
	}
	curveP521 = &curve{
		typ:      P521,
		params:   []byte{0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x23}, // 1.3.132.0.35
		elliptic: elliptic.P521, size: 66,
	}
	curveEd25519 = &curve{
		typ:    Ed25519,
		params: []byte{0x06, 0x03, 0x2b, 0x65, 0x70}, // 1.3.101.112
		name:   append([]byte{0x13, 0x0c}, "edwards25519"...),
		size:   ed25519.PublicKeySize,
	}
	curves = []*curve{curveP256, curveP384, curveP521, curveEd25519}
)

// parseCurve reads CKA_EC_PARAMS: an object identifier, or for Ed25519 the
// curve's name as a printable string (PKCS#11 v3.0, section 2.3.10).
func parseCurve(params []byte) (*curve, error) {
	for _, c := range curves {
		if bytes.Equal(params, c.params) || c.name != nil && bytes.Equal(params, c.name) {
			return c, nil
		}
	}
	return nil, fmt.Errorf("%w: EC key on %s; JOSE signs on P-256, P-384, P-521 and Ed25519", ErrUnsupported, describeCurve(params))
}

// describeCurve puts parameters that are none of ours into words.
func describeCurve(params []byte) string {
	var oid asn1.ObjectIdentifier
	if rest, err := asn1.Unmarshal(params, &oid); err == nil && len(rest) == 0 {
		return "curve " + oid.String()
	}
	var name string
	if rest, err := asn1.UnmarshalWithParams(params, &name, "printable"); err == nil && len(rest) == 0 {
		return fmt.Sprintf("curve %q", name)
	}
	return "a curve that is not named"
}

// maxPointHeader is the longest header that wraps a point: the tag, two bytes
// of length, and the count of unused bits of a BIT STRING.
const maxPointHeader = 4

// parsePoint reads CKA_EC_POINT. It is a point wrapped into a DER OCTET STRING
// in most modules (PKCS#11 v2.40, section 2.3.3), the bare point in others, a
// BIT STRING in some, and for P-521, whose point is longer than 127 bytes, an
// OCTET STRING with a wrong header in one. So it takes the point from the end
// and lets the curve decide: bytes that are no point of it are refused.
func (c *curve) parsePoint(raw []byte) (crypto.PublicKey, error) {
	if c.elliptic == nil {
		if point := unwrapPoint(raw, c.size); point != nil {
			return ed25519.PublicKey(bytes.Clone(point)), nil
		}
		return nil, c.badPoint(raw)
	}
	if point := unwrapPoint(raw, 1+2*c.size); point != nil {
		if public, err := ecdsa.ParseUncompressedPublicKey(c.elliptic(), point); err == nil {
			return public, nil
		}
	}
	if point := unwrapPoint(raw, 1+c.size); point != nil {
		if x, y := elliptic.UnmarshalCompressed(c.elliptic(), point); x != nil {
			return ecdsa.ParseUncompressedPublicKey(c.elliptic(), elliptic.Marshal(c.elliptic(), x, y)) //nolint:staticcheck // the only way from a compressed point
		}
	}
	return nil, c.badPoint(raw)
}

func (c *curve) badPoint(raw []byte) error {
	return fmt.Errorf("%w: CKA_EC_POINT of %d bytes is no point of %s", ErrUnsupported, len(raw), c.typ)
}

// unwrapPoint returns the last size bytes of raw, if what stands before them
// can be the header of an OCTET STRING or BIT STRING, or is nothing.
func unwrapPoint(raw []byte, size int) []byte {
	header := len(raw) - size
	switch {
	case header == 0:
		return raw
	case header < 2 || header > maxPointHeader:
		return nil
	case raw[0] != asn1.TagOctetString && raw[0] != asn1.TagBitString:
		return nil
	}
	return raw[header:]
}

// point returns the bare point of a public key.
func point(public crypto.PublicKey) ([]byte, error) {
	switch public := public.(type) {
	case *ecdsa.PublicKey:
		return public.Bytes()
	case ed25519.PublicKey:
		return public, nil
	}
	return nil, fmt.Errorf("%w: %T has no point", ErrUnsupported, public)
}

// wrapPoint puts a point into a DER OCTET STRING.
func wrapPoint(point []byte) ([]byte, error) { return asn1.Marshal(point) }

// curveOf returns the curve of a public key, or nil.
func curveOf(public crypto.PublicKey) *curve {
	switch public := public.(type) {
	case ed25519.PublicKey:
		return curveEd25519
	case *ecdsa.PublicKey:
		for _, c := range curves {
			if c.elliptic != nil && c.elliptic() == public.Curve {
				return c
			}
		}
	}
	return nil
}
