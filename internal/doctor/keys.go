package doctor

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jwk"
	"github.com/hsmkey/hsmkey/jws"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// sighting is a key on one endpoint.
type sighting struct {
	label, id string // id in hexadecimal digits
	typ       hsmkey.KeyType
	kid       string
	proof     string // what tells it from other keys: the public key, or a code by the secret
	err       error  // why it signs no tokens
}

func (s sighting) name() string { return cmp.Or(s.label, "\x00"+s.id) }

// see takes down what tells a key from others.
func see(ctx context.Context, label string, id []byte, key *hsmkey.HSMJWK) (sighting, error) {
	s := sighting{label: label, id: hex.EncodeToString(id), typ: key.Type()}
	var err error
	if s.kid, err = jwk.KeyID(key); err != nil {
		s.err = err
		return s, nil
	}
	if public := key.Public(); public != nil {
		var der []byte
		der, s.err = x509.MarshalPKIXPublicKey(public)
		s.proof = string(der)
		return s, nil
	}
	const message = "hsmkey doctor: which secret is this?" // no JWS signing input: it has no dot
	mac, err := key.SignJWS(ctx, key.Algorithms()[0], []byte(message))
	if err != nil {
		return s, err
	}
	s.proof = string(mac)
	return s, nil
}

// checkKey checks that the key which was asked for is there, and signs.
func (x *examination) checkKey(ctx context.Context, e *Endpoint, source sessionpool.Source) {
	found := (*checks)(&e.Checks)
	key, err := hsmkey.FromHSM(ctx, source, x.Key)
	var seen sighting
	if err == nil {
		seen, err = see(ctx, key.Label(), key.ID(), key)
	}
	if err == nil {
		err = seen.err
	}
	if err != nil {
		hint := "`hsmkey key list` shows the keys of a token"
		switch {
		case down(err):
			hint = connectionHint(e.Transport, err)
		case errors.Is(err, hsmkey.ErrKeyNotFound):
			e.Key = Missing
			if e.List != "" {
				hint = importHint
			}
		case errors.Is(err, hsmkey.ErrAmbiguous):
			e.Key = Ambiguous
		case errors.Is(err, hsmkey.ErrUnsupported):
			e.Key = Unusable
		}
		found.fail("key", err, hint)
		return
	}
	e.Key = Usable
	e.keys = []sighting{seen}
	found.ok("key", "%s, %s, kid %s", hsmkey.Query{Label: key.Label(), ID: key.ID()}, key.Type(), seen.kid)
	checkSignature(ctx, e, key)
}

// signatures is how many signatures of a key are measured, and signatureTime
// bounds how long that may take.
const (
	signatures    = 5
	signatureTime = 2 * time.Second
)

// checkSignature has the key sign, and verifies what it signs.
func checkSignature(ctx context.Context, e *Endpoint, key *hsmkey.HSMJWK) {
	const name = "signature"
	found := (*checks)(&e.Checks)
	signed, hint, err := sign(ctx, e, key, signatures)
	if err != nil {
		found.fail(name, err, hint)
		return
	}
	e.Signature = signed.took
	if key.Public() == nil {
		found.ok(name, "%s, computed twice alike, %s", signed.algorithm, signed.took)
		return
	}
	found.ok(name, "%s, verified with the public key, %s", signed.algorithm, signed.took)
}

// signed is what came of having a key sign.
type signed struct {
	algorithm hsmkey.Algorithm
	took      Milliseconds // the median
}

// sign has a key sign some times, and verifies what it signs. The hint is for the
// error.
func sign(ctx context.Context, e *Endpoint, key *hsmkey.HSMJWK, times int) (s signed, hint string, err error) {
	signer, err := jws.NewSigner(key, jws.Options{})
	if err != nil {
		return signed{}, "`hsmkey key list` shows which algorithms each key signs with", err
	}
	var token string
	took, err := median(times, signatureTime, func() (err error) {
		token, err = signer.Sign(ctx, []byte("hsmkey doctor"))
		return err
	})
	if err != nil {
		hint := "may the key sign, and does the token do this algorithm?"
		if down(err) {
			hint = connectionHint(e.Transport, err)
		}
		return signed{}, hint, err
	}
	verifier, err := jws.NewKeyVerifier(key, jws.VerifierOptions{Algorithms: []hsmkey.Algorithm{signer.Algorithm()}})
	if err == nil {
		_, err = verifier.Verify(ctx, token)
	}
	if err != nil {
		return signed{}, "does the public key on the token belong to the private key?",
			failure(hsmkey.ErrUnsupported, err, "the key signs, but not by its public key")
	}
	return signed{signer.Algorithm(), Milliseconds(took)}, "", nil
}

// down reports whether err is the HSM's, not the key's.
func down(err error) bool {
	return errors.Is(err, hsmkey.ErrSession) || errors.Is(err, hsmkey.ErrTimeout)
}

// listKeys takes down every key of an endpoint, and has them sign.
func (x *examination) listKeys(ctx context.Context, e *Endpoint, source sessionpool.Source) {
	const name = "keys"
	found := (*checks)(&e.Checks)
	list, err := hsmkey.ListKeys(ctx, source)
	if err != nil {
		found.fail(name, err, connectionHint(e.Transport, err))
		return
	}
	var usable []*hsmkey.HSMJWK
	for _, info := range list {
		seen := sighting{label: info.Label, id: hex.EncodeToString(info.ID), err: info.Err}
		if info.Err == nil {
			if seen, err = see(ctx, info.Label, info.ID, info.Key); err != nil {
				found.fail(name, err, connectionHint(e.Transport, err))
				return
			}
		}
		if seen.err == nil {
			usable = append(usable, info.Key)
		}
		e.keys = append(e.keys, seen)
	}
	e.listed, e.UsableKeys = true, len(usable)
	text := count(len(usable), "key")
	if len(usable) == 0 {
		text = "no key for tokens"
	}
	if others := len(list) - len(usable); others > 0 {
		text += fmt.Sprintf(", and %d for other purposes", others)
	}
	if len(usable) == 0 {
		hint := "`hsmkey key generate` makes a key"
		switch {
		case e.Login == NoPIN:
			hint = "set HSM_PIN_FILE or HSM_PIN: without a PIN private keys do not show"
		case e.List != "":
			hint = importHint
		}
		found.fail(name, failure(hsmkey.ErrKeyNotFound, nil, "%s", text), hint)
		return
	}
	found.ok(name, "%s", text)
	tryKeys(ctx, e, usable)
}

// mostTried is how many keys of an endpoint sign where none was asked for: a token
// may have thousands. They are the first by label and id, so that endpoints with
// the same keys try the same ones.
const mostTried = 16

// tryKeys has each key sign once.
func tryKeys(ctx context.Context, e *Endpoint, usable []*hsmkey.HSMJWK) {
	const name = "signature"
	found := (*checks)(&e.Checks)
	tried := usable[:min(len(usable), mostTried)]
	for _, key := range tried {
		if _, hint, err := sign(ctx, e, key, 1); err != nil {
			found.fail(name, fmt.Errorf("the key with %s: %w", hsmkey.Query{Label: key.Label(), ID: key.ID()}, err), hint)
			if down(err) {
				return // for the other keys, too
			}
			continue
		}
		e.SignedKeys++
	}
	switch {
	case e.SignedKeys < len(tried):
	case len(tried) < len(usable):
		found.ok(name, "of the first %d keys of %d, one each; --key LABEL tries another one", len(tried), len(usable))
	default:
		found.ok(name, "of each key, once")
	}
}

// compareAsked finds the endpoints that have another key than the others, of
// those that have the one that was asked for.
func compareAsked(endpoints []*Endpoint) {
	var all []sighting
	for _, e := range endpoints {
		all = append(all, e.keys...)
	}
	right := common(all)
	reference := ""
	for _, e := range endpoints {
		if len(e.keys) > 0 && e.keys[0].proof == right {
			reference = cmp.Or(reference, e.Name)
		}
	}
	for _, e := range endpoints {
		if len(e.keys) > 0 && e.keys[0].proof != right {
			e.Key = Different
			(*checks)(&e.Checks).fail("same key", failure(hsmkey.ErrKeyMismatch, nil, "it is not the key that %s has under this name", reference), differentHint)
		}
	}
}

const importHint = "`hsmkey key import` with the balance list puts a key onto every endpoint that lacks it"

const differentHint = "delete the wrong key with a balance list of its endpoint alone, then import the right one with the whole list"

// common is the proof of the key that most endpoints have; of several, the first.
func common(seen []sighting) string {
	votes := map[string]int{}
	best := ""
	for _, s := range seen {
		if s.err == nil {
			votes[s.proof]++
		}
	}
	for _, s := range seen {
		if s.err == nil && votes[s.proof] > votes[best] {
			best = s.proof
		}
	}
	return best
}

// compare goes through every name that a key has on some endpoint.
func compare(endpoints []*Endpoint) []Key {
	named := map[string]bool{}
	listed := 0
	for _, e := range endpoints {
		if e.listed {
			listed++
		}
		for _, s := range e.keys {
			named[s.name()] = true
		}
	}
	var keys []Key
	for name := range named {
		keys = append(keys, compareName(endpoints, name, listed))
	}
	slices.SortFunc(keys, func(a, b Key) int {
		return cmp.Or(strings.Compare(a.Label, b.Label), strings.Compare(a.ID, b.ID))
	})
	return keys
}

// compareName compares the keys that have one name.
func compareName(endpoints []*Endpoint, name string, listed int) Key {
	var all []sighting
	for _, e := range endpoints {
		all = append(all, e.called(name)...)
	}
	k := Key{Label: all[0].label, Status: OK}
	if k.Label == "" {
		k.ID = all[0].id
	}
	right := common(all)
	var odd error
	kids := map[string]bool{}
	for _, s := range all {
		switch {
		case s.err != nil:
			odd = s.err
		case s.proof == right:
			k.Type, k.KeyID = s.typ, cmp.Or(k.KeyID, s.kid)
			kids[s.kid] = true
		}
	}
	for _, e := range endpoints {
		switch here := e.called(name); {
		case !e.listed:
		case len(here) == 0:
			k.Missing = append(k.Missing, e.Name)
		case len(here) > 1:
			k.Ambiguous = append(k.Ambiguous, e.Name)
		case here[0].proof != right:
			k.Different = append(k.Different, e.Name)
		}
	}
	k.judge(listed, len(kids), odd, right == "")
	return k
}

// judge says what to think of a key.
func (k *Key) judge(listed, kids int, odd error, unusable bool) {
	if unusable {
		k.Detail = fmt.Sprintf("signs no tokens: %v", odd)
		k.Missing, k.Ambiguous = nil, nil // nobody will look for it
		return
	}
	var parts []string
	note := func(status Status, hint, format string, args ...any) {
		k.Status.worst(status)
		k.Hint = cmp.Or(k.Hint, hint)
		parts = append(parts, fmt.Sprintf(format, args...))
	}
	failed := func(sentinel error, what string, endpoints []string, hint string) {
		if on := strings.Join(endpoints, ", "); on != "" {
			note(Fail, hint, "%s %s", what, on)
			if k.Err == nil {
				k.Err = failure(sentinel, nil, "%s %s", what, on)
			}
		}
	}
	failed(hsmkey.ErrKeyMismatch, "another key on", k.Different, differentHint)
	failed(hsmkey.ErrAmbiguous, "several keys of this name on", k.Ambiguous, "a key that is looked up by this name is not used there; --id tells them apart")
	failed(hsmkey.ErrKeyNotFound, "missing on", k.Missing, importHint)
	if kids > 1 {
		note(Warn, "the kid of an HMAC key is its id: import it everywhere with the same --id", "the same key under several ids, and so with several kids")
	}
	k.Detail = cmp.Or(strings.Join(parts, "; "), "the same on "+count(listed, "endpoint"))
}

// called are the keys with one name.
func (e *Endpoint) called(name string) []sighting {
	var all []sighting
	for _, s := range e.keys {
		if s.name() == name {
			all = append(all, s)
		}
	}
	return all
}
