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
func (h *HSM) Delete(ctx context.Context, query Query) error {
	if err := query.check(); err != nil {
		return err
	}
	query = query.clone()
	s, err := h.source.Acquire(ctx, sessionpool.ReadWrite())
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
	var left error
	for _, o := range public {
		if o.label != key.label {
			continue
		}
		if err := t.module.DestroyObject(t.session, o.handle); err != nil {
			left = errors.Join(left, fmt.Errorf("the key with %s on %s is deleted, its public key is not: %w", key, t.name, err))
		}
	}
	return left
}
