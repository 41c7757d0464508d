package hsmkey

import (
	"bytes"
	"context"
	"crypto"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/balance"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// Outcome is what became of a key on one endpoint of the balance lists.
type Outcome string

// The outcomes of [HSM.ImportEach] and [HSM.DeleteEach].
const (
	Imported Outcome = "imported"
	Present  Outcome = "present" // the very same key was there already; of a deletion: it is there still
	Deleted  Outcome = "deleted"
	Absent   Outcome = "absent" // there was nothing to delete
	Failed   Outcome = "failed" // EndpointResult.Err says why
)

// EndpointResult is what became of a key on one endpoint of the balance lists.
type EndpointResult struct {
	Endpoint string // as in its list, without a PIN
	List     string // path of the list
	Outcome  Outcome
	Err      error // nil unless Outcome is Failed
}

// ImportEach is [HSM.Import] with an account of what became of the key on each
// endpoint of the balance lists, in their order. Without lists there is none.
func (h *HSM) ImportEach(ctx context.Context, label string, key any, id []byte) (*HSMJWK, []EndpointResult, error) {
	typ, recipes, err := importers(key)
	if err != nil {
		return nil, nil, err
	}
	if err := checkLabel(label); err != nil {
		return nil, nil, err
	}
	if err := h.beginMaking(ctx); err != nil {
		return nil, nil, err
	}
	defer h.endMaking()
	makeOn := func(source sessionpool.Source, id []byte) (*HSMJWK, error) {
		return create(ctx, source, label, id, string(typ), recipes, proveSignature)
	}
	if h.balancer == nil {
		made, err := makeOn(h.source, id)
		return made, nil, err
	}
	f, err := h.fleet()
	if err != nil {
		return nil, nil, err
	}
	there := ask(f, func(source sessionpool.Source) (*HSMJWK, error) {
		return findSame(ctx, source, label, key)
	})
	want := commonID(id, there, label, key)
	for i, m := range f.members {
		r := &f.results[i]
		switch {
		case r.Outcome == Absent:
			there[i], err = makeOn(m, want)
			r.settle(Imported, err)
			if errors.Is(err, ErrExists) {
				// Somebody was faster, or two endpoints are one HSM.
				if same, odd := findSame(ctx, m, label, key); odd == nil {
					there[i] = same
					r.settle(Present, nil)
				}
			}
		case r.Outcome == Present && len(id) > 0 && !bytes.Equal(there[i].material.id, id):
			r.settle(Failed, fmt.Errorf("%w: the key is there with id %x", ErrExists, there[i].material.id))
		}
	}
	if err := f.err(fmt.Sprintf("importing the %s key %q", typ, label)); err != nil {
		return nil, f.results, err
	}
	return &HSMJWK{material: there[0].material, source: h.source}, f.results, nil
}

// DeleteEach is [HSM.Delete] with an account of what became of the key on each
// endpoint of the balance lists, in their order. Without lists there is none.
// Where nothing was deleted because an endpoint could not be asked, the others
// tell whether the key is Present or Absent.
func (h *HSM) DeleteEach(ctx context.Context, query Query) ([]EndpointResult, error) {
	if err := query.check(); err != nil {
		return nil, err
	}
	query = query.clone()
	if h.balancer == nil {
		return nil, remove(ctx, h.source, query)
	}
	f, err := h.fleet()
	if err != nil {
		return nil, err
	}
	there := ask(f, func(source sessionpool.Source) (*sighting, error) {
		return look(ctx, source, query)
	})
	// An endpoint that says nothing may have another key of this name. When it is
	// back, that one would be the only one left, and deleted for being the same on
	// all that have it.
	if err := f.err(fmt.Sprintf("nothing was deleted, every endpoint has to be asked first: looking for the key with %s", query)); err != nil {
		return f.results, err
	}
	if err := f.sameKey(there, query); err != nil {
		return f.results, err
	}
	deleted := false
	for i, m := range f.members {
		if r := &f.results[i]; r.Outcome == Present {
			err := remove(ctx, m, query)
			if r.settle(Deleted, err); deleted && errors.Is(err, ErrKeyNotFound) {
				r.settle(Absent, nil) // two endpoints are one HSM
			}
			deleted = deleted || err == nil
		}
	}
	if err := f.err(fmt.Sprintf("deleting the key with %s", query)); err != nil || deleted {
		return f.results, err
	}
	return f.results, fmt.Errorf("%w: no endpoint of the balance lists has a private or secret key with %s", ErrKeyNotFound, query)
}

// fleet is one piece of work on every endpoint.
type fleet struct {
	members []balance.Member
	results []EndpointResult
}

func (h *HSM) fleet() (*fleet, error) {
	f := &fleet{members: h.balancer.Members()}
	if len(f.members) == 0 {
		return nil, fmt.Errorf("%w: the HSM is closed", ErrClosed)
	}
	for _, m := range f.members {
		f.results = append(f.results, EndpointResult{Endpoint: m.Name, List: m.List})
	}
	return f, nil
}

// ask has every endpoint asked whether a key is there, all at once, so that
// nobody waits for one dead HSM after the other. Changes are made one after the
// other: two endpoints may turn out to be one HSM.
func ask[T any](f *fleet, whether func(sessionpool.Source) (T, error)) []T {
	answers := make([]T, len(f.members))
	var group sync.WaitGroup
	for i, m := range f.members {
		group.Go(func() {
			var err error
			answers[i], err = whether(m)
			if r := &f.results[i]; errors.Is(err, ErrKeyNotFound) {
				r.Outcome = Absent
			} else {
				r.settle(Present, err)
			}
		})
	}
	group.Wait()
	return answers
}

// settle takes note of an outcome, unless there is an error.
func (r *EndpointResult) settle(outcome Outcome, err error) {
	if r.Outcome, r.Err = outcome, err; err != nil {
		r.Outcome = Failed
	}
}

// err is what failed, on which endpoints.
func (f *fleet) err(doing string) error {
	failed := &endpointsError{doing: doing, of: len(f.results)}
	for _, r := range f.results {
		if r.Err != nil {
			failed.results = append(failed.results, r)
		}
	}
	if len(failed.results) == 0 {
		return nil
	}
	return failed
}

// endpointsError matches what the failures of the endpoints match.
type endpointsError struct {
	doing   string
	of      int
	results []EndpointResult
}

func (e *endpointsError) Error() string {
	var text strings.Builder
	fmt.Fprintf(&text, "%s failed on %d of %d endpoints", e.doing, len(e.results), e.of)
	for _, r := range e.results {
		fmt.Fprintf(&text, "; %s: %v", r.Endpoint, r.Err)
	}
	return text.String()
}

func (e *endpointsError) Unwrap() []error {
	errs := make([]error, len(e.results))
	for i, r := range e.results {
		errs[i] = r.Err
	}
	return errs
}

// findSame finds the key with a label, and proves that it is the one to be
// imported.
func findSame(ctx context.Context, source sessionpool.Source, label string, key any) (*HSMJWK, error) {
	found, err := FromHSM(ctx, source, Query{Label: label})
	switch {
	case errors.Is(err, ErrUnsupported):
		return nil, fmt.Errorf("%w: a key of another kind has the label %q: %w", ErrExists, label, err)
	case err != nil:
		return nil, err
	case !isImportOf(found.material, key):
		return nil, fmt.Errorf("%w: another key has the label %q", ErrExists, label)
	}
	return found, nil
}

// isImportOf reports whether a key on the HSM is the one from outside.
func isImportOf(k *material, key any) bool {
	if secret, ok := key.([]byte); ok {
		return k.public == nil && k.typ == hmacType(uint(len(secret))) && hmac.Equal(k.mark, markOf(secret, k.algorithms[0]))
	}
	private, ok := key.(crypto.Signer)
	return ok && k.public != nil && samePublic(k.public, private.Public())
}

// commonID is the CKA_ID that the key is to have on all endpoints.
func commonID(id []byte, there []*HSMJWK, label string, key any) []byte {
	if len(id) > 0 {
		return id
	}
	for _, k := range there {
		if k != nil && len(k.material.id) > 0 {
			return k.material.id
		}
	}
	// The same whenever the import is made again.
	var proof []byte
	switch key := key.(type) {
	case []byte:
		proof = markOf(key, HS256)
	case crypto.Signer:
		proof, _ = x509.MarshalPKIXPublicKey(key.Public()) // it was checked: a key that can be imported
	}
	sum := sha256.Sum256(append([]byte(label+"\x00"), proof...))
	return sum[:16]
}

// sighting is what a key that is to be deleted is told from others by: its
// public key or its mark, nothing if it signs no tokens.
type sighting struct{ proof [sha256.Size]byte }

// look finds the key to be deleted.
func look(ctx context.Context, source sessionpool.Source, query Query) (*sighting, error) {
	var seen *sighting
	err := sessionpool.Retry(ctx, source, func(s *sessionpool.Session) error {
		var got sighting
		err := s.Do(ctx, func(m sessionpool.Module, session pkcs11.SessionHandle) error {
			t := token{m, session, s.Token().Name()}
			o, err := t.theOne(query)
			if err != nil {
				return err
			}
			k, err := t.describe(o, query)
			switch {
			case err == nil:
				got.proof = k.identity.(identity).proof //nolint:errcheck // what describe made
			case hasCode(err) && !t.answers():
				return err
			}
			return nil
		})
		if err == nil {
			seen = &got
		}
		return err
	})
	return seen, err
}

// sameKey refuses to delete different keys that happen to have the same name: a
// deletion has no way back.
func (f *fleet) sameKey(there []*sighting, query Query) error {
	var kinds []sighting
	var where [][]string
	for i, seen := range there {
		if seen == nil {
			continue
		}
		at := slices.Index(kinds, *seen)
		if at < 0 {
			at = len(kinds)
			kinds, where = append(kinds, *seen), append(where, nil)
		}
		where[at] = append(where[at], f.members[i].Name)
	}
	if len(kinds) < 2 {
		return nil
	}
	parts := make([]string, len(where))
	for i, names := range where {
		parts[i] = strings.Join(names, ", ")
	}
	err := fmt.Errorf("%w: the endpoints have %d different keys with %s, nothing was deleted: one on %s",
		ErrAmbiguous, len(kinds), query, strings.Join(parts, "; another on "))
	for i, seen := range there {
		if seen != nil {
			f.results[i].settle(Failed, err)
		}
	}
	return err
}
