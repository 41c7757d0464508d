package hsmkey

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// Numbers of PKCS#11 v3.0 that the binding does not know.
const (
	ckkECEdwards           = 0x00000040
	ckmECEdwardsKeyPairGen = 0x00001055
	ckmEdDSA               = 0x00001057
)

// attr is short for what templates are made of.
func attr(typ uint, value any) *pkcs11.Attribute { return pkcs11.NewAttribute(typ, value) }

// token is a module at work in one session.
type token struct {
	module  sessionpool.Module
	session pkcs11.SessionHandle
	name    string // for errors
}

// attribute reads one attribute of an object, alone: in a list, one that the
// module does not know would hide all others. What the object lacks, or keeps
// to itself, is reported as not there.
func (t token) attribute(o pkcs11.ObjectHandle, typ uint) (value []byte, there bool, err error) {
	got, err := t.module.GetAttributeValue(t.session, o, []*pkcs11.Attribute{attr(typ, nil)})
	if notThere(err) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("reading an object's attribute 0x%x: %w", typ, err)
	}
	if len(got) != 1 || got[0] == nil || got[0].Value == nil {
		return nil, false, nil
	}
	return got[0].Value, true, nil
}

// attributes reads attributes that nearly every object has, in one call; where
// one is missing, one by one. What is not there is nil.
func (t token) attributes(o pkcs11.ObjectHandle, types ...uint) ([][]byte, error) {
	template := make([]*pkcs11.Attribute, len(types))
	for i, typ := range types {
		template[i] = attr(typ, nil)
	}
	values := make([][]byte, len(types))
	got, err := t.module.GetAttributeValue(t.session, o, template)
	switch {
	case err == nil && len(got) == len(types):
		for i := range got {
			values[i] = got[i].Value
		}
		return values, nil
	case err != nil && !notThere(err):
		return nil, fmt.Errorf("reading an object's attributes: %w", err)
	}
	for i, typ := range types {
		if values[i], _, err = t.attribute(o, typ); err != nil {
			return nil, err
		}
	}
	return values, nil
}

// notThere reports whether a read failed because an object lacks an attribute,
// or keeps it to itself.
func notThere(err error) bool {
	return isCode(err, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID) || isCode(err, pkcs11.CKR_ATTRIBUTE_SENSITIVE) ||
		isCode(err, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID)
}

// ulong reads a CK_ULONG attribute.
func (t token) ulong(o pkcs11.ObjectHandle, typ uint) (value uint, there bool, err error) {
	raw, there, err := t.attribute(o, typ)
	if err != nil || !there {
		return 0, false, err
	}
	value, there = decodeUlong(raw)
	return value, there, nil
}

// decodeBool reads a CK_BBOOL; one that is not there has the value absent.
func decodeBool(b []byte, absent bool) bool {
	if len(b) != 1 {
		return absent
	}
	return b[0] != 0
}

// decodeUlong reads a CK_ULONG, whose size is that of a C unsigned long at the
// module's end: 8 bytes, or 4 on Windows and 32-bit systems.
func decodeUlong(b []byte) (uint, bool) {
	switch len(b) {
	case 4:
		return uint(binary.NativeEndian.Uint32(b)), true
	case 8:
		return uint(binary.NativeEndian.Uint64(b)), true
	}
	return 0, false
}

func isCode(err error, code uint) bool { return errors.Is(err, pkcs11.Error(code)) }

func hasCode(err error) bool { return errors.As(err, new(pkcs11.Error)) }
