package hsmkey

import (
	"encoding/hex"
	"fmt"
	"slices"
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
	class   uint   // CKO_*, or untold
	odd     error  // why no more than that is known
	stored  string // CKA_LABEL
	label   string // the same without padding
	id      []byte
	keyType uint // CKK_*, or untold
	signs   bool // CKA_SIGN, unless it says nothing of it
	always  bool // CKA_ALWAYS_AUTHENTICATE

	// beside are the objects of other classes that the search for it met.
	beside []object
}

// untold is the class of an object, or the type of a key, that tells none.
const untold = ^uint(0)

func newObject(handle pkcs11.ObjectHandle) object {
	return object{handle: handle, class: untold, keyType: untold, signs: true}
}

func (o object) readable() bool { return o.odd == nil }

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

// named are the attributes that tell an object from others, and asked those that are
// read of the objects of a class besides. Nearly every key has them, so that one call
// serves; data objects have no id, and are read one by one.
var (
	named = []uint{pkcs11.CKA_CLASS, pkcs11.CKA_LABEL, pkcs11.CKA_ID}
	asked = map[uint][]uint{
		pkcs11.CKO_PRIVATE_KEY: {pkcs11.CKA_KEY_TYPE, pkcs11.CKA_SIGN, pkcs11.CKA_ALWAYS_AUTHENTICATE},
		pkcs11.CKO_SECRET_KEY:  {pkcs11.CKA_KEY_TYPE, pkcs11.CKA_SIGN},
		pkcs11.CKO_PUBLIC_KEY:  {pkcs11.CKA_KEY_TYPE},
	}
)

// read reads attributes of an object into what is known of it.
func (t token) read(o *object, types ...uint) error {
	values, err := t.attributes(o.handle, types...)
	if err != nil {
		return err
	}
	for i, value := range values {
		switch types[i] {
		case pkcs11.CKA_CLASS:
			if class, there := decodeUlong(value); there {
				o.class = class
			}
		case pkcs11.CKA_LABEL:
			o.stored = string(value)
			o.label = trimLabel(o.stored)
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
	return nil
}

// search returns the objects of a class that match a template. One module also lists
// objects that nobody asked for.
func (t token) search(class uint, by ...*pkcs11.Attribute) ([]object, error) {
	handles, err := t.find(append([]*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, class)}, by...)...)
	if err != nil {
		return nil, err
	}
	types := slices.Concat(named, asked[class])
	var found []object
	for _, handle := range handles {
		o := newObject(handle)
		err := t.read(&o, types...)
		switch {
		case err != nil && !t.answers():
			return nil, err
		case err != nil:
			found = append(found, object{handle: handle, class: class, odd: err})
		case o.class == class:
			found = append(found, o)
		}
	}
	return found, nil
}

// searchAll is search for several classes at once, by a template that says more than a
// class: a token has few objects of one name, and each search goes to the HSM and
// back half a dozen times. Beside those objects it returns what else it met. Where the
// module refuses such a search, or an object cannot be read, it returns nothing and no
// error: then a search by class has to tell.
func (t token) searchAll(classes []uint, by []*pkcs11.Attribute) (found, beside []object, err error) {
	handles, err := t.find(by...)
	for _, handle := range handles {
		o := newObject(handle)
		err = t.read(&o, named...)
		wanted := slices.Contains(classes, o.class)
		if err == nil && wanted {
			err = t.read(&o, asked[o.class]...)
		}
		if err != nil {
			break
		}
		if wanted {
			found = append(found, o)
		} else {
			beside = append(beside, o)
		}
	}
	switch {
	case err == nil:
		return found, beside, nil
	case t.answers():
		return nil, nil, nil
	}
	return nil, nil, err
}

// matching returns the objects of some classes that a query matches. Among them are
// those that the token finds by label or id and then does not let us read: nobody
// knows what they are, so they may be what was meant.
func (t token) matching(q Query, classes ...uint) ([]object, error) {
	var byID, byLabel []*pkcs11.Attribute
	if len(q.ID) > 0 {
		byID = append(byID, attr(pkcs11.CKA_ID, q.ID))
	}
	if q.Label != "" {
		byLabel = append(byLabel, attr(pkcs11.CKA_LABEL, q.Label))
	}
	found, err := t.matchingBy(append(byLabel, byID...), q, classes)
	if err != nil || len(found) > 0 || q.Label == "" {
		return found, err
	}
	// Perhaps the label is padded with spaces: no template of the plain one matches
	// that, so every label is looked at.
	return t.matchingBy(byID, q, classes)
}

func (t token) matchingBy(by []*pkcs11.Attribute, q Query, classes []uint) ([]object, error) {
	var all, beside []object
	if len(classes) > 1 && len(by) > 0 {
		var err error
		if all, beside, err = t.searchAll(classes, by); err != nil {
			return nil, err
		}
	}
	if len(all) == 0 { // some modules search for one class only
		for _, class := range classes {
			some, err := t.search(class, by...)
			if err != nil {
				return nil, err
			}
			all = append(all, some...)
		}
	}
	var found []object
	for _, o := range all {
		if !o.readable() && len(by) > 0 || o.readable() && q.matches(o.label, o.id) {
			o.beside = beside
			found = append(found, o)
		}
	}
	return found, nil
}

// candidates returns every private or secret key that a query matches.
func (t token) candidates(q Query) ([]object, error) { return t.matching(q, keyClasses...) }

// related returns the objects of another class that belong to a key: those with
// its id, else those with its label and no id of their own. A key without an id
// has only its label to go by, as it stands there: padding tells it from others.
func (t token) related(key object, class uint) ([]object, error) {
	var found []object
	if len(key.id) > 0 {
		var err error
		found, err = t.matching(Query{ID: key.id}, class)
		if err != nil || slices.ContainsFunc(found, object.readable) {
			return found, err
		}
	}
	if key.label == "" {
		return found, nil
	}
	labelled, err := t.matching(Query{Label: key.stored}, class)
	for _, o := range labelled {
		if len(o.id) == 0 || len(key.id) == 0 {
			found = append(found, o)
		}
	}
	return found, err
}

// labelled returns what tells which of some objects have the label of a key: as it
// stands there, or, if none has, but for the padding.
func labelled(key object, objects []object) func(object) bool {
	exact := slices.ContainsFunc(objects, func(o object) bool { return o.readable() && o.stored == key.stored })
	return func(o object) bool { return o.label == key.label && (!exact || o.stored == key.stored) }
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
		err := fmt.Errorf("%w: %d keys with %s on %s; tell them apart by id: %s", ErrAmbiguous, len(found), q, t.name, listIDs(found))
		for _, o := range found {
			if !o.readable() {
				return object{}, fmt.Errorf("%w: %w", err, o.odd)
			}
		}
		return object{}, err
	case !found[0].readable():
		return object{}, fmt.Errorf("the key with %s on %s cannot be read: %w", q, t.name, found[0].odd)
	}
	return found[0], nil
}

// listIDs names keys that a query cannot tell apart.
func listIDs(found []object) string {
	const most = 8
	var ids []string
	for _, o := range found[:min(len(found), most)] {
		id := hex.EncodeToString(o.id)
		if !o.readable() {
			id = "one that cannot be read"
		}
		ids = append(ids, id)
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
