package hsmkey

import (
	"bytes"
	"cmp"
	"context"
	"slices"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// KeyInfo is one private or secret key in a listing.
type KeyInfo struct {
	Label string
	ID    []byte

	// Key is the key, ready to sign. It is nil if Err is set.
	Key *HSMJWK

	// Err says why the key cannot be used for tokens. It matches ErrUnsupported
	// for a kind of key or a curve that JOSE does not know, ErrKeyNotFound if
	// there is no public key to it.
	Err error
}

// Keys lists every private and secret key, ordered by label and id. A key that
// cannot be used, or not even be read, has its Err set and does not hide the
// others. Over several tokens it lists those of one.
func (h *HSM) Keys(ctx context.Context) ([]KeyInfo, error) { return ListKeys(ctx, h.source) }

// ListKeys lists the keys that can be reached through sessions of a source that
// the caller made. [HSM.Keys] is the same for an opened HSM.
func ListKeys(ctx context.Context, source sessionpool.Source) ([]KeyInfo, error) {
	var keys []KeyInfo
	err := sessionpool.Retry(ctx, source, func(s *sessionpool.Session) error {
		var listed []KeyInfo
		err := s.Do(ctx, func(m sessionpool.Module, session pkcs11.SessionHandle) (err error) {
			listed, err = token{m, session, s.Token().Name()}.list(source)
			return err
		})
		if err == nil {
			keys = listed
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return keys, nil
}

func (t token) list(source sessionpool.Source) ([]KeyInfo, error) {
	var keys []KeyInfo
	for _, class := range keyClasses {
		objects, err := t.search(class)
		if err != nil {
			return nil, err
		}
		for _, o := range objects {
			info := KeyInfo{Label: o.label, ID: o.id}
			var k *material
			err := o.odd
			if err == nil {
				k, err = t.describe(o, Query{Label: o.label, ID: o.id})
			}
			switch {
			case err == nil:
				info.Key = &HSMJWK{material: k, source: source}
			case hasCode(err) && !t.answers():
				return nil, err
			default:
				info.Err = err
			}
			keys = append(keys, info)
		}
	}
	slices.SortStableFunc(keys, func(a, b KeyInfo) int {
		return cmp.Or(cmp.Compare(a.Label, b.Label), bytes.Compare(a.ID, b.ID))
	})
	return keys, nil
}
