package hsmkey

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// beginMaking waits until no other key is made. endMaking must follow.
func (h *HSM) beginMaking(ctx context.Context) error {
	select {
	case h.making <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ended(ctx, "waiting for another key to be made")
	}
}

func (h *HSM) endMaking() { <-h.making }

// maker is a token while a key is made on it.
type maker struct {
	token
	label string
	id    []byte
	made  []pkcs11.ObjectHandle
}

// recipe makes the objects of one key, and notes each in made. A key type may
// have several, for modules that want its attributes written another way.
type recipe func(*maker) error

// create makes a key by the first recipe that the token takes. It is never
// tried again on another session: that makes duplicates. Whatever was made is
// removed when a later step fails, when ctx ends, and when the module answers
// after everybody has left.
func create(ctx context.Context, source sessionpool.Source, label string, id []byte, what string, recipes []recipe, prove func(token, *material, pkcs11.ObjectHandle) error) (*HSMJWK, error) {
	if id = slices.Clone(id); len(id) == 0 {
		id = make([]byte, 16)
		rand.Read(id) //nolint:errcheck // never fails: it ends the process instead
	}
	s, err := source.Acquire(ctx, sessionpool.ReadWrite())
	if err != nil {
		return nil, err
	}
	defer s.Release()
	release, err := reserve(ctx, s.Token())
	if err != nil {
		return nil, err
	}
	defer release()

	var state atomic.Int32
	var made *material
	err = s.Do(ctx, func(m sessionpool.Module, session pkcs11.SessionHandle) error {
		k := &maker{token: token{m, session, s.Token().Name()}, label: label, id: id}
		if err := k.free(); err != nil {
			return err
		}
		var err error
		if made, err = k.make(recipes, prove); err != nil {
			return err
		}
		if !state.CompareAndSwap(creating, created) {
			return errors.Join(ErrTimeout, k.undo())
		}
		return nil
	})
	if err != nil && !state.CompareAndSwap(creating, abandoned) {
		err = nil // the key was ready when the wait for it ended
	}
	if err != nil {
		err = fmt.Errorf("making the %s key %q: %w", what, label, err)
		if errors.Is(err, ErrSession) || errors.Is(err, errLeft) {
			on := s.Token()
			s.Release() // it may be the only one
			err = errors.Join(err, sweep(ctx, source, on, label, id))
		}
		return nil, err
	}
	return &HSMJWK{material: made, source: source}, nil
}

// The life of a key that is being made, of which its maker and those who wait
// for it have to agree on the end.
const (
	creating int32 = iota
	created
	abandoned
)

// checkLabel refuses labels that could not be looked up again.
func checkLabel(label string) error {
	switch {
	case trimLabel(label) == "":
		return fmt.Errorf("%w: a key needs a label", ErrInvalid)
	case trimLabel(label) != label:
		return fmt.Errorf("%w: the label %q ends with a space", ErrInvalid, label)
	case !utf8.ValidString(label) || strings.ContainsFunc(label, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return fmt.Errorf("%w: the label %q is not plain text", ErrInvalid, label)
	}
	return nil
}

// free makes sure that neither label nor id names a key already.
func (k *maker) free() error {
	for _, q := range []Query{{Label: k.label}, {ID: k.id}} {
		taken, err := k.candidates(q)
		if err != nil {
			return err
		}
		if len(taken) > 0 {
			return fmt.Errorf("%w: %s has one with %s", ErrExists, k.name, q)
		}
	}
	return nil
}

// make tries one recipe after the other until a key comes out that can be found
// again, is the only one of its name, and passes the proof.
func (k *maker) make(recipes []recipe, prove func(token, *material, pkcs11.ObjectHandle) error) (*material, error) {
	var first error
	for _, r := range recipes {
		got, err := k.cook(r, prove)
		if err == nil {
			return got, nil
		}
		if first == nil {
			first = err
		}
		if undone := k.undo(); undone != nil {
			return nil, errors.Join(first, undone)
		}
		if !errors.Is(err, ErrUnsupported) {
			break
		}
	}
	return nil, first
}

func (k *maker) cook(r recipe, prove func(token, *material, pkcs11.ObjectHandle) error) (*material, error) {
	if err := r(k); err != nil {
		return nil, k.explain(err)
	}
	query := Query{Label: k.label, ID: k.id}
	o, err := k.sole(query)
	if err != nil {
		return nil, err
	}
	got, err := k.describe(o, query)
	if err != nil {
		return nil, err
	}
	if prove != nil {
		if err := prove(k.token, got, o.handle); err != nil {
			return nil, err
		}
	}
	return got, nil
}

// sole returns the new key, and proves that neither its label nor its id names
// another one: another process may have found both free at the same time. Of two that
// meet, both may give up here, and never both go on.
func (k *maker) sole(query Query) (o object, err error) {
	for _, q := range []Query{{Label: k.label}, {ID: k.id}, query} {
		if o, err = k.theOne(q); errors.Is(err, ErrAmbiguous) {
			return object{}, fmt.Errorf("%w: somebody made another one with %s on %s at the same time", ErrExists, q, k.name)
		} else if err != nil {
			return object{}, err
		}
	}
	return o, nil
}

// errLeft says that a key is half made, and could not be removed in its session.
var errLeft = errors.New("removing what was made")

// undo removes what was made, the private key first.
func (k *maker) undo() error {
	var failed error
	for _, handle := range slices.Backward(k.made) {
		if err := k.module.DestroyObject(k.session, handle); err != nil {
			failed = errors.Join(failed, fmt.Errorf("%w: %w", errLeft, err))
		}
	}
	k.made = nil
	return failed
}

// explain tells a token that does not make such keys from one that is in
// trouble.
func (k *maker) explain(err error) error {
	if refuses(err) {
		return fmt.Errorf("%w: %s: %w", ErrUnsupported, k.name, err)
	}
	return err
}

// refusals are the codes by which a token says that it cannot, or will not.
var refusals = []pkcs11.Error{
	pkcs11.CKR_ACTION_PROHIBITED,
	pkcs11.CKR_ARGUMENTS_BAD,
	pkcs11.CKR_ATTRIBUTE_READ_ONLY,
	pkcs11.CKR_ATTRIBUTE_TYPE_INVALID,
	pkcs11.CKR_ATTRIBUTE_VALUE_INVALID,
	pkcs11.CKR_CURVE_NOT_SUPPORTED,
	pkcs11.CKR_DOMAIN_PARAMS_INVALID,
	pkcs11.CKR_FUNCTION_NOT_SUPPORTED,
	pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED,
	pkcs11.CKR_KEY_SIZE_RANGE,
	pkcs11.CKR_KEY_TYPE_INCONSISTENT,
	pkcs11.CKR_MECHANISM_INVALID,
	pkcs11.CKR_MECHANISM_PARAM_INVALID,
	pkcs11.CKR_SESSION_READ_ONLY,
	pkcs11.CKR_TEMPLATE_INCOMPLETE,
	pkcs11.CKR_TEMPLATE_INCONSISTENT,
	pkcs11.CKR_TOKEN_WRITE_PROTECTED,
}

func refuses(err error) bool {
	var code pkcs11.Error
	return errors.As(err, &code) && slices.Contains(refusals, code)
}

// sweepTime bounds how long a failed call goes on cleaning up.
const sweepTime = 30 * time.Second

// sweep removes what a session that died may have left behind of a new key. Its
// label and id were free before, so whatever has both is that key.
func sweep(ctx context.Context, source sessionpool.Source, on *sessionpool.Token, label string, id []byte) error {
	failed := func(err error) error {
		return fmt.Errorf("objects with label %q and id %x may have been left on %s: %w", label, id, on.Name(), err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), sweepTime)
	defer cancel()
	s, err := source.Acquire(ctx, sessionpool.ReadWrite())
	if err != nil {
		return failed(err)
	}
	defer s.Release()
	if s.Token().Name() != on.Name() { // of another HSM; one may be seen through several instances of its library
		return failed(ErrSession)
	}
	err = s.Do(ctx, func(m sessionpool.Module, session pkcs11.SessionHandle) error {
		k := &maker{token: token{m, session, on.Name()}, label: label, id: id}
		for _, class := range []uint{pkcs11.CKO_PUBLIC_KEY, pkcs11.CKO_SECRET_KEY, pkcs11.CKO_PRIVATE_KEY} {
			left, err := k.matching(Query{Label: label, ID: id}, class)
			if err != nil {
				return err
			}
			for _, o := range left {
				if !o.readable() {
					return o.odd // which may be of others
				}
				k.made = append(k.made, o.handle)
			}
		}
		return k.undo()
	})
	if err != nil {
		return failed(err)
	}
	return nil
}
