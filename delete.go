package hsmkey

import (
	"context"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// Delete removes the one key that the query matches, and its public-key object
// with the same id and label. Certificates stay. The key need not be one that
// signs tokens.
//
// The error matches ErrKeyNotFound or ErrAmbiguous if not exactly one key
// matches; then nothing was removed. Deleting is never repeated on another
// session.
//
// With balance lists the key is deleted on every endpoint. All are asked for it
// first: while one of them does not answer, nothing is deleted, because it may have
// another key by that name. Where the endpoints have different ones, nothing is
// deleted either, and the error matches ErrAmbiguous. Endpoints that lack the key
// are fine if one has it, so that a deletion which failed on some can be made
// again; if none has it that is ErrKeyNotFound. The error names each endpoint that
// failed, and matches what their failures match; [HSM.DeleteEach] tells more.
func (h *HSM) Delete(ctx context.Context, query Query) error {
	_, err := h.DeleteEach(ctx, query)
	return err
}

// remove deletes a key on one HSM.
func remove(ctx context.Context, source sessionpool.Source, query Query) error {
	s, err := source.Acquire(ctx, sessionpool.ReadWrite())
	if err != nil {
		return err
	}
	defer s.Release()
	return s.Do(ctx, func(m sessionpool.Module, session pkcs11.SessionHandle) error {
		return token{m, session, s.Token().Name()}.remove(query)
	})
}

func (t token) remove(query Query) error {
	key, err := t.theOne(query)
	if err != nil {
		return err
	}
	var public []object
	if key.class == pkcs11.CKO_PRIVATE_KEY {
		if public, err = t.related(key, pkcs11.CKO_PUBLIC_KEY); err != nil {
			return err
		}
	}
	if err := t.module.DestroyObject(t.session, key.handle); err != nil {
		if refuses(err) {
			err = fmt.Errorf("%w: %w", ErrUnsupported, err)
		}
		return fmt.Errorf("deleting the key with %s on %s: %w", key, t.name, err)
	}
	ours := labelled(key, public)
	var left error
	for _, o := range public {
		switch {
		case !o.readable():
			left = errors.Join(left, fmt.Errorf("the key with %s on %s is deleted, what may be its public key cannot be read: %w", key, t.name, o.odd))
			continue
		case !ours(o):
			continue
		}
		if err := t.module.DestroyObject(t.session, o.handle); err != nil {
			left = errors.Join(left, fmt.Errorf("the key with %s on %s is deleted, its public key is not: %w", key, t.name, err))
		}
	}
	return left
}
