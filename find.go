package hsmkey

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/miekg/pkcs11"
)

const (
	// findBatch is how many handles one C_FindObjects may return. Many a module
	// returns fewer, one a call, while there are more.
	findBatch = 64

	// maxFound bounds what a search may yield: a module that goes beyond it
	// does not end its searches at all.
	maxFound = 1 << 20
)

// find returns the handles of all objects that match a template. Results left
// behind would leak into the next search of the session, so it reads until none
// is left and ends the search on every path.
func (t token) find(template ...*pkcs11.Attribute) (found []pkcs11.ObjectHandle, err error) {
	if err := t.module.FindObjectsInit(t.session, template); err != nil {
		return nil, fmt.Errorf("searching for objects: %w", err)
	}
	defer func() {
		if final := t.module.FindObjectsFinal(t.session); final != nil && err == nil {
			found, err = nil, fmt.Errorf("ending a search for objects: %w", final)
		}
	}()
	for {
		some, _, err := t.module.FindObjects(t.session, findBatch)
		if err != nil {
			return nil, fmt.Errorf("searching for objects: %w", err)
		}
		if len(some) == 0 {
			return found, nil
		}
		if found = append(found, some...); len(found) > maxFound {
			return nil, fmt.Errorf("%w: %s yields more than %d objects to one search", ErrUnsupported, t.name, maxFound)
		}
	}
}

// object is an object with what tells it from others and, if it is a key, what is
// asked of each.
type object struct {
	handle  pkcs11.ObjectHandle
	class   uint
	label   string
	id      []byte
	keyType uint // CKK_*, or untold
	signs   bool // CKA_SIGN, unless it says nothing of it
	always  bool // CKA_ALWAYS_AUTHENTICATE
}

// untold is the type of a key that tells none.
const untold = ^uint(0)

// String names a key for errors: by its label, else by its id.
func (o object) String() string { return nameKey(o.label, o.id) }

func nameKey(label string, id []byte) string {
	if label != "" {
		return Query{Label: label}.String()
	}
	return Query{ID: id}.String()
}

// keyClasses are the classes of objects that sign.
var keyClasses = []uint{pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_SECRET_KEY}

// asked are the attributes that identify reads of the objects of a class: those
// that nearly all of them have, so that one call serves for all.
var asked = map[uint][]uint{
	pkcs11.CKO_PRIVATE_KEY: {pkcs11.CKA_CLASS, pkcs11.CKA_LABEL, pkcs11.CKA_ID, pkcs11.CKA_KEY_TYPE, pkcs11.CKA_SIGN, pkcs11.CKA_ALWAYS_AUTHENTICATE},
	pkcs11.CKO_SECRET_KEY:  {pkcs11.CKA_CLASS, pkcs11.CKA_LABEL, pkcs11.CKA_ID, pkcs11.CKA_KEY_TYPE, pkcs11.CKA_SIGN},
	pkcs11.CKO_PUBLIC_KEY:  {pkcs11.CKA_CLASS, pkcs11.CKA_LABEL, pkcs11.CKA_ID, pkcs11.CKA_KEY_TYPE},
	pkcs11.CKO_CERTIFICATE: {pkcs11.CKA_CLASS, pkcs11.CKA_LABEL, pkcs11.CKA_ID},
}

// identify reads what tells an object from others, and whether it is what the
// search was for: one module also lists objects that nobody asked for.
func (t token) identify(handle pkcs11.ObjectHandle, class uint) (o object, wanted bool, err error) {
	o = object{handle: handle, class: class, keyType: untold, signs: true}
	values, err := t.attributes(handle, asked[class]...)
	if err != nil {
		return o, false, err
	}
	for i, value := range values {
		switch asked[class][i] {
		case pkcs11.CKA_CLASS:
			is, there := decodeUlong(value)
			wanted = there && is == class
		case pkcs11.CKA_LABEL:
			o.label = trimLabel(string(value))
		case pkcs11.CKA_ID:
			o.id = value
		case pkcs11.CKA_KEY_TYPE:
			if number, there := decodeUlong(value); there {
				o.keyType = number
			}
		case pkcs11.CKA_SIGN:
			o.signs = decodeBool(value, true)
		case pkcs11.CKA_ALWAYS_AUTHENTICATE:
			o.always = decodeBool(value, false)
		}
	}
	return o, wanted, nil
}

// candidates returns every private or secret key that a query matches.
func (t token) candidates(q Query) ([]object, error) {
	var found []object
	for _, class := range keyClasses {
		template := []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, class)}
		if q.Label != "" {
			template = append(template, attr(pkcs11.CKA_LABEL, q.Label))
		}
		if len(q.ID) > 0 {
			template = append(template, attr(pkcs11.CKA_ID, q.ID))
		}
		handles, err := t.find(template...)
		if err != nil {
			return nil, err
		}
		for _, handle := range handles {
			o, asked, err := t.identify(handle, class)
			if err != nil {
				return nil, err
			}
			if asked && q.matches(o.label, o.id) {
				found = append(found, o)
			}
		}
	}
	if len(found) == 0 && q.Label != "" {
		return t.paddedCandidates(q)
	}
	return found, nil
}

// paddedCandidates looks for keys whose label is padded with spaces, which no
// template of the plain label matches: it reads the label of every key. Keys
// that cannot be read are passed over.
func (t token) paddedCandidates(q Query) ([]object, error) {
	var found []object
	for _, class := range keyClasses {
		template := []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, class)}
		if len(q.ID) > 0 {
			template = append(template, attr(pkcs11.CKA_ID, q.ID))
		}
		handles, err := t.find(template...)
		if err != nil {
			return nil, err
		}
		for _, handle := range handles {
			label, there, err := t.attribute(handle, pkcs11.CKA_LABEL)
			if err != nil && !t.answers() {
				return nil, err
			}
			if !there || trimLabel(string(label)) != trimLabel(q.Label) {
				continue
			}
			o, asked, err := t.identify(handle, class)
			if err != nil {
				return nil, err
			}
			if asked && q.matches(o.label, o.id) {
				found = append(found, o)
			}
		}
	}
	return found, nil
}

// related returns the objects of another class that belong to a key: those with
// its id, else those with its label and no id of their own. A key without an id
// has only its label to go by.
func (t token) related(key object, class uint) ([]object, error) {
	if len(key.id) > 0 {
		found, err := t.relatedBy(class, attr(pkcs11.CKA_ID, key.id), func(o object) bool {
			return bytes.Equal(o.id, key.id)
		})
		if err != nil || len(found) > 0 {
			return found, err
		}
	}
	if key.label == "" {
		return nil, nil
	}
	return t.relatedBy(class, attr(pkcs11.CKA_LABEL, key.label), func(o object) bool {
		return o.label == key.label && (len(o.id) == 0 || len(key.id) == 0)
	})
}

func (t token) relatedBy(class uint, by *pkcs11.Attribute, belongs func(object) bool) ([]object, error) {
	handles, err := t.find(attr(pkcs11.CKA_CLASS, class), by)
	if err != nil {
		return nil, err
	}
	var found []object
	for _, handle := range handles {
		o, asked, err := t.identify(handle, class)
		if err != nil {
			return nil, err
		}
		if asked && belongs(o) {
			found = append(found, o)
		}
	}
	return found, nil
}

// theOne returns the only key that a query matches, proven by looking at all.
func (t token) theOne(q Query) (object, error) {
	found, err := t.candidates(q)
	switch {
	case err != nil:
		return object{}, err
	case len(found) == 0:
		return object{}, t.notFound(q)
	case len(found) > 1:
		return object{}, fmt.Errorf("%w: %d keys with %s on %s; tell them apart by id: %s", ErrAmbiguous, len(found), q, t.name, listIDs(found))
	}
	return found[0], nil
}

// listIDs names keys that a query cannot tell apart.
func listIDs(found []object) string {
	const most = 8
	var ids []string
	for _, o := range found[:min(len(found), most)] {
		ids = append(ids, hex.EncodeToString(o.id))
	}
	if len(found) > most {
		ids = append(ids, "...")
	}
	return strings.Join(ids, ", ")
}

// notFound is the answer to a search that went well and found nothing.
func (t token) notFound(q Query) error {
	hint := ""
	if info, err := t.module.GetSessionInfo(t.session); err != nil {
		return err
	} else if info.State == pkcs11.CKS_RO_PUBLIC_SESSION || info.State == pkcs11.CKS_RW_PUBLIC_SESSION {
		hint = "; the session is not logged in, and private keys show only after a login: set a PIN"
	}
	return fmt.Errorf("%w: no private or secret key with %s on %s%s", ErrKeyNotFound, q, t.name, hint)
}

// answers reports whether the session is still good after a call failed: then
// the failure was the object's own trouble.
func (t token) answers() bool {
	_, err := t.module.GetSessionInfo(t.session)
	return err == nil
}
