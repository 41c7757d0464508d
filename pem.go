package hsmkey

import (
	"crypto/ecdh"
	"crypto/x509"
	"encoding/pem"
	"fmt"
)

// ParsePrivateKey reads the private key of a PEM file in PKCS #8 (RFC 5958), as
// openssl genpkey writes it, for [HSM.Import]. Other blocks of the file, such as
// certificates, are passed over; a second private key is an error.
//
// The error matches ErrInvalid if there is no private key, if it is encrypted or
// in an older format, with the command that converts it; ErrUnsupported if it is
// of a kind that does not sign.
func ParsePrivateKey(data []byte) (any, error) {
	var key any
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		switch block.Type {
		case "PRIVATE KEY":
			if key != nil {
				return nil, fmt.Errorf("%w: the file holds more than one private key", ErrInvalid)
			}
			parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				// Its text may quote the key's content; its kind is enough.
				return nil, fmt.Errorf("%w: the file holds a PKCS #8 private key that cannot be read, or one on a curve that JOSE does not know", ErrInvalid)
			}
			if _, ok := parsed.(*ecdh.PrivateKey); ok {
				return nil, fmt.Errorf("%w: the file holds an X25519 key, which does not sign", ErrUnsupported)
			}
			key = parsed
		case "ENCRYPTED PRIVATE KEY":
			return nil, fmt.Errorf("%w: the private key is encrypted; decrypt it first: openssl pkcs8 -in FILE", ErrInvalid)
		case "RSA PRIVATE KEY", "EC PRIVATE KEY", "DSA PRIVATE KEY":
			return nil, fmt.Errorf("%w: the private key is in the format %q; convert it to PKCS #8 first: openssl pkcs8 -topk8 -nocrypt -in FILE", ErrInvalid, block.Type)
		}
	}
	if key == nil {
		return nil, fmt.Errorf("%w: the file holds no PEM private key in PKCS #8 (-----BEGIN PRIVATE KEY-----)", ErrInvalid)
	}
	return key, nil
}
