package hsmkey_test

import (
	"slices"
	"strings"
	"sync/atomic"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// odd is what the decorators below have in common. Each makes the real module
// behave as one of the modules in the field does.
type odd struct{ sessionpool.Module }

func (o odd) Unwrap() sessionpool.Module { return o.Module }

// oneACall returns one handle a call, as some modules do however many may be.
type oneACall struct{ odd }

func (o oneACall) FindObjects(h pkcs11.SessionHandle, _ int) ([]pkcs11.ObjectHandle, bool, error) {
	return o.Module.FindObjects(h, 1)
}

// listsAll returns every object to every search, whatever it was for.
type listsAll struct{ odd }

func (o listsAll) FindObjectsInit(h pkcs11.SessionHandle, _ []*pkcs11.Attribute) error {
	return o.Module.FindObjectsInit(h, nil)
}

// wantsClass answers code to a search without a class; if that is CKR_OK, it finds
// nothing.
type wantsClass struct {
	odd
	code uint
}

func (o wantsClass) FindObjectsInit(h pkcs11.SessionHandle, template []*pkcs11.Attribute) error {
	if !slices.ContainsFunc(template, func(a *pkcs11.Attribute) bool { return a.Type == pkcs11.CKA_CLASS }) {
		if o.code != pkcs11.CKR_OK {
			return pkcs11.Error(o.code)
		}
		template = []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, "no such label")}
	}
	return o.Module.FindObjectsInit(h, template)
}

// padded pads labels with spaces to 32 bytes.
type padded struct{ odd }

func (o padded) GetAttributeValue(h pkcs11.SessionHandle, object pkcs11.ObjectHandle, a []*pkcs11.Attribute) ([]*pkcs11.Attribute, error) {
	got, err := o.Module.GetAttributeValue(h, object, a)
	for _, x := range got {
		if x.Type == pkcs11.CKA_LABEL {
			x.Value = append(x.Value, strings.Repeat(" ", 32-len(x.Value))...)
		}
	}
	return got, err
}

func (o padded) FindObjectsInit(h pkcs11.SessionHandle, template []*pkcs11.Attribute) error {
	template = slices.Clone(template)
	for i, x := range template {
		if x.Type != pkcs11.CKA_LABEL {
			continue
		}
		// What is not padded matches nothing here.
		label := strings.TrimRight(string(x.Value), " ")
		if len(x.Value) != 32 {
			label = "no such label"
		}
		template[i] = pkcs11.NewAttribute(pkcs11.CKA_LABEL, label)
	}
	return o.Module.FindObjectsInit(h, template)
}

// answers changes what one attribute reads as, for objects that have it.
type answers struct {
	odd
	attribute uint
	change    func(value []byte) ([]byte, error)
}

func (o answers) GetAttributeValue(h pkcs11.SessionHandle, object pkcs11.ObjectHandle, a []*pkcs11.Attribute) ([]*pkcs11.Attribute, error) {
	got, err := o.Module.GetAttributeValue(h, object, a)
	if err != nil {
		return nil, err
	}
	for _, x := range got {
		if x.Type == o.attribute && x.Value != nil {
			if x.Value, err = o.change(x.Value); err != nil {
				return nil, err
			}
		}
	}
	return got, nil
}

// unreadable fails each attempt to read anything of the objects of a class that have
// a value in one attribute.
type unreadable struct {
	odd
	class, attribute uint
	value            string
	code             uint
}

func (o unreadable) GetAttributeValue(h pkcs11.SessionHandle, object pkcs11.ObjectHandle, a []*pkcs11.Attribute) ([]*pkcs11.Attribute, error) {
	got, err := o.Module.GetAttributeValue(h, object, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, nil), pkcs11.NewAttribute(o.attribute, nil)})
	class := pkcs11.NewAttribute(pkcs11.CKA_CLASS, o.class).Value
	if err == nil && slices.Equal(got[0].Value, class) && string(got[1].Value) == o.value {
		return nil, pkcs11.Error(o.code)
	}
	return o.Module.GetAttributeValue(h, object, a)
}

// lacks has no such mechanisms: it answers code to their use, and lists them or
// not.
type lacks struct {
	odd
	mechanisms []uint
	code       uint
	listed     bool
	refused    *atomic.Int32
}

func (o lacks) GetMechanismList(slot uint) ([]*pkcs11.Mechanism, error) {
	list, err := o.Module.GetMechanismList(slot)
	if !o.listed {
		list = slices.DeleteFunc(list, func(m *pkcs11.Mechanism) bool { return slices.Contains(o.mechanisms, m.Mechanism) })
	}
	return list, err
}

func (o lacks) SignSingle(dst []byte, h pkcs11.SessionHandle, m *pkcs11.Mechanism, key pkcs11.ObjectHandle, data []byte, size int) ([]byte, error) {
	if slices.Contains(o.mechanisms, m.Mechanism) {
		o.refused.Add(1)
		return nil, pkcs11.Error(o.code)
	}
	return o.Module.SignSingle(dst, h, m, key, data, size)
}

// counts counts searches begun and ended.
type counts struct {
	odd
	begun, ended *atomic.Int32
}

func (o counts) FindObjectsInit(h pkcs11.SessionHandle, template []*pkcs11.Attribute) error {
	err := o.Module.FindObjectsInit(h, template)
	if err == nil {
		o.begun.Add(1)
	}
	return err
}

func (o counts) FindObjectsFinal(h pkcs11.SessionHandle) error {
	o.ended.Add(1)
	return o.Module.FindObjectsFinal(h)
}

// oneAttribute has trouble with reads of several attributes at once.
type oneAttribute struct{ odd }

func (o oneAttribute) GetAttributeValue(h pkcs11.SessionHandle, object pkcs11.ObjectHandle, a []*pkcs11.Attribute) ([]*pkcs11.Attribute, error) {
	if len(a) > 1 {
		return nil, pkcs11.Error(pkcs11.CKR_ATTRIBUTE_TYPE_INVALID)
	}
	return o.Module.GetAttributeValue(h, object, a)
}

// while reads attributes another way for as long as it is on.
type while struct {
	odd
	on  *atomic.Bool
	way sessionpool.Module
}

func (o while) GetAttributeValue(h pkcs11.SessionHandle, object pkcs11.ObjectHandle, a []*pkcs11.Attribute) ([]*pkcs11.Attribute, error) {
	if o.on.Load() {
		return o.way.GetAttributeValue(h, object, a)
	}
	return o.Module.GetAttributeValue(h, object, a)
}
