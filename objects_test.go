package hsmkey_test

import (
	"context"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// do runs fn with a read-write session of an HSM, beside the library's own
// ideas of keys.
func do(tb testing.TB, h *hsmkey.HSM, fn func(sessionpool.Module, pkcs11.SessionHandle) error) {
	tb.Helper()
	ctx := context.Background()
	s, err := h.Source().Acquire(ctx, sessionpool.ReadWrite())
	if err != nil {
		tb.Fatal(err)
	}
	defer s.Release()
	if err := s.Do(ctx, fn); err != nil {
		tb.Fatal(err)
	}
}

// stats is what the pool of an HSM counts.
func stats(tb testing.TB, h *hsmkey.HSM) sessionpool.Stats {
	tb.Helper()
	pool, ok := h.Source().(*sessionpool.Pool)
	if !ok {
		tb.Fatalf("the source is a %T", h.Source())
	}
	return pool.Stats()
}

// find returns the objects that match a template.
func find(m sessionpool.Module, session pkcs11.SessionHandle, template ...*pkcs11.Attribute) ([]pkcs11.ObjectHandle, error) {
	if err := m.FindObjectsInit(session, template); err != nil {
		return nil, err
	}
	found, _, err := m.FindObjects(session, 1000)
	if err != nil {
		return nil, err
	}
	return found, m.FindObjectsFinal(session)
}

// objects counts everything on the token.
func objects(tb testing.TB, h *hsmkey.HSM) (n int) {
	tb.Helper()
	do(tb, h, func(m sessionpool.Module, session pkcs11.SessionHandle) error {
		all, err := find(m, session)
		n = len(all)
		return err
	})
	return n
}

// create puts an object of any kind onto the token.
func create(tb testing.TB, h *hsmkey.HSM, label, id string, template ...*pkcs11.Attribute) (handle pkcs11.ObjectHandle) {
	tb.Helper()
	template = append(template,
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
		pkcs11.NewAttribute(pkcs11.CKA_ID, id))
	do(tb, h, func(m sessionpool.Module, session pkcs11.SessionHandle) (err error) {
		handle, err = m.CreateObject(session, template)
		return err
	})
	return handle
}

// createSecret puts a secret key of any type onto the token.
func createSecret(tb testing.TB, h *hsmkey.HSM, label, id string, keyType uint, value []byte, more ...*pkcs11.Attribute) pkcs11.ObjectHandle {
	tb.Helper()
	return create(tb, h, label, id, append(more,
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, keyType),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE, value))...)
}

// remove takes objects off the token.
func remove(tb testing.TB, h *hsmkey.HSM, template ...*pkcs11.Attribute) {
	tb.Helper()
	do(tb, h, func(m sessionpool.Module, session pkcs11.SessionHandle) error {
		found, err := find(m, session, template...)
		if err != nil {
			return err
		}
		if len(found) == 0 {
			tb.Error("nothing to remove")
		}
		for _, o := range found {
			if err := m.DestroyObject(session, o); err != nil {
				return err
			}
		}
		return nil
	})
}
