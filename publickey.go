package hsmkey

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"

	"github.com/miekg/pkcs11"
)

// publicKey finds the public half of a private key. What the private object
// itself tells comes first, since it cannot belong to another key: most modules
// show an RSA modulus there. Then comes the public-key object with the same id,
// then a certificate with the same id.
func (t token) publicKey(key object) (crypto.PublicKey, error) {
	public, odd := t.publicOf(key)
	if public != nil || odd != nil && !errors.Is(odd, ErrUnsupported) {
		return public, odd
	}
	if public := t.namesake(key); public != nil {
		return public, nil
	}
	for _, source := range []struct {
		class uint
		read  func(object) (crypto.PublicKey, error)
	}{
		{pkcs11.CKO_PUBLIC_KEY, t.publicOf},
		{pkcs11.CKO_CERTIFICATE, t.certified},
	} {
		objects, err := t.related(key, source.class)
		if err != nil {
			return nil, err
		}
		public, err := choosePublic(key, objects, source.read)
		if public != nil || errors.Is(err, ErrAmbiguous) {
			return public, err
		}
		odd = cmp.Or(odd, err)
	}
	if odd == nil && key.keyType != pkcs11.CKK_RSA {
		_, odd = t.curveOf(key.handle) // perhaps there is nothing to look for
	}
	if odd != nil {
		return nil, odd
	}
	return nil, fmt.Errorf("%w: %s has the private key with %s, but neither its public key nor a certificate with the same id",
		ErrKeyNotFound, t.name, key)
}

// namesake reads the public key from objects that the search for the private key has
// met beside it, of those with its id. If that was a search by label, these are the
// ones that decide among all with that id; if by id, they are all. It returns nil where
// there is none, or any doubt: then publicKey searches for them.
func (t token) namesake(key object) crypto.PublicKey {
	var same []object
	for _, o := range key.beside {
		if o.class == pkcs11.CKO_PUBLIC_KEY && len(o.id) > 0 && bytes.Equal(o.id, key.id) {
			o.keyType = key.keyType
			same = append(same, o)
		}
	}
	public, err := choosePublic(key, same, t.publicOf)
	if err != nil {
		return nil
	}
	return public
}

// choosePublic reads the public keys that claim to belong to a private key. If
// they differ, those with its label count; if these still differ, none does.
func choosePublic(key object, objects []object, read func(object) (crypto.PublicKey, error)) (crypto.PublicKey, error) {
	var told []object
	var public []crypto.PublicKey // what they told
	var odd error
	for _, o := range objects {
		one, err := crypto.PublicKey(nil), o.odd
		if err == nil {
			one, err = read(o)
		}
		if err != nil {
			odd = cmp.Or(odd, err)
			continue
		}
		if one != nil && sameKind(one, key.keyType) {
			told, public = append(told, o), append(public, one)
		}
	}
	ours := labelled(key, told)
	var all, ofLabel []crypto.PublicKey
	for i, o := range told {
		all = addPublic(all, public[i])
		if ours(o) {
			ofLabel = addPublic(ofLabel, public[i])
		}
	}
	switch {
	case len(all) == 0:
		return nil, odd
	case len(all) == 1:
		return all[0], nil
	case len(ofLabel) == 1:
		return ofLabel[0], nil
	}
	return nil, fmt.Errorf("%w: %d different public keys claim to belong to the private key with %s", ErrAmbiguous, len(all), key)
}

func addPublic(list []crypto.PublicKey, public crypto.PublicKey) []crypto.PublicKey {
	for _, known := range list {
		if samePublic(known, public) {
			return list
		}
	}
	return append(list, public)
}

// samePublic reports whether two public keys are the same key.
func samePublic(a, b crypto.PublicKey) bool {
	key, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && key.Equal(b)
}

// sameKind reports whether a public key is of a PKCS#11 key type. Modules call
// Ed25519 either CKK_EC_EDWARDS or CKK_EC.
func sameKind(public crypto.PublicKey, keyType uint) bool {
	if _, ok := public.(*rsa.PublicKey); ok {
		return keyType == pkcs11.CKK_RSA
	}
	return keyType == pkcs11.CKK_EC || keyType == ckkECEdwards
}

// publicOf reads the public key that an object, private or public, tells by its
// own attributes. It returns nil if it tells none.
func (t token) publicOf(o object) (public crypto.PublicKey, err error) {
	switch o.keyType {
	case pkcs11.CKK_RSA:
		public, err = t.rsaPublicOf(o.handle)
	case pkcs11.CKK_EC, ckkECEdwards:
		public, err = t.ecPublicOf(o)
	default:
		return nil, nil
	}
	if public != nil || err != nil {
		return public, err
	}
	info, there, err := t.attribute(o.handle, pkcs11.CKA_PUBLIC_KEY_INFO)
	if err != nil || !there {
		return nil, err
	}
	// Some modules answer with nothing, or with half of it.
	if public, err := x509.ParsePKIXPublicKey(info); err == nil && sameKind(public, o.keyType) {
		return public, nil
	}
	return nil, nil
}

func (t token) rsaPublicOf(o pkcs11.ObjectHandle) (crypto.PublicKey, error) {
	values, err := t.attributes(o, pkcs11.CKA_MODULUS, pkcs11.CKA_PUBLIC_EXPONENT)
	if err != nil {
		return nil, err
	}
	n, e := new(big.Int).SetBytes(values[0]), new(big.Int).SetBytes(values[1])
	if n.Bit(0) == 0 || e.Bit(0) == 0 || e.BitLen() > 31 || e.Int64() < 3 {
		return nil, nil // a private object may lack them, or show zeros
	}
	return &rsa.PublicKey{N: n, E: int(e.Int64())}, nil
}

// ecPublicOf reads curve and point.
func (t token) ecPublicOf(o object) (crypto.PublicKey, error) {
	// A private object seldom has a point. It is asked for that alone: a list of which
	// something is missing would be read one by one.
	if o.class == pkcs11.CKO_PRIVATE_KEY {
		if point, _, err := t.attribute(o.handle, pkcs11.CKA_EC_POINT); err != nil || len(point) == 0 {
			return nil, err
		}
	}
	values, err := t.attributes(o.handle, pkcs11.CKA_EC_PARAMS, pkcs11.CKA_EC_POINT)
	if err != nil || len(values[0]) == 0 || len(values[1]) == 0 {
		return nil, err
	}
	c, err := parseCurve(values[0])
	if err != nil {
		return nil, err
	}
	return c.parsePoint(values[1])
}

// curveOf reads the curve of an EC key. One that is none of ours is an error that
// names it; it is nil if the object tells none.
func (t token) curveOf(o pkcs11.ObjectHandle) (*curve, error) {
	params, there, err := t.attribute(o, pkcs11.CKA_EC_PARAMS)
	if err != nil || !there || len(params) == 0 {
		return nil, err
	}
	return parseCurve(params)
}

// certified reads the public key of a certificate.
func (t token) certified(o object) (crypto.PublicKey, error) {
	der, there, err := t.attribute(o.handle, pkcs11.CKA_VALUE)
	if err != nil || !there {
		return nil, err
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil // not every certificate object is an X.509 one
	}
	return certificate.PublicKey, nil
}
