package hsmkey

import (
	"context"
	"crypto/hmac"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// PKCS#11's types of secret keys.
const (
	ckkGenericSecret = pkcs11.CKK_GENERIC_SECRET
	ckkSHA256HMAC    = pkcs11.CKK_SHA256_HMAC
	ckkSHA384HMAC    = pkcs11.CKK_SHA384_HMAC
	ckkSHA512HMAC    = pkcs11.CKK_SHA512_HMAC
)

// FromHSM finds the one key that the query matches, through sessions of a
// source that the caller made. [HSM.Key] is the same for an opened HSM.
//
// The error matches ErrKeyNotFound if no key matches, ErrAmbiguous if several
// do, ErrUnsupported if the key is of a kind that cannot sign tokens.
//
// Of the HSMs of a [github.com/hsmkey/hsmkey/balance.Balancer] those that answer are asked, and where they
// disagree on which key it is, most of them are right, or the one that stands
// first in the list. The others are left out. Over another source of several
// tokens the first that has the key answers.
func FromHSM(ctx context.Context, source sessionpool.Source, query Query) (*HSMJWK, error) {
	if err := query.check(); err != nil {
		return nil, err
	}
	query = query.clone()
	if f, ok := source.(voters); ok {
		if found, err := elect(ctx, f, query); found != nil || err != nil {
			return newKey(found, source), err
		}
	}
	found, err := lookUp(ctx, source, query)
	return newKey(found, source), err
}

func newKey(k *material, source sessionpool.Source) *HSMJWK {
	if k == nil {
		return nil
	}
	return &HSMJWK{material: k, source: source}
}

// lookUp finds the key on the first token of a source that has it.
func lookUp(ctx context.Context, source sessionpool.Source, query Query) (*material, error) {
	var key *material
	err := sessionpool.Retry(ctx, source, func(s *sessionpool.Session) error {
		var found *material
		err := s.Do(ctx, func(m sessionpool.Module, h pkcs11.SessionHandle) error {
			t := token{m, h, s.Token().Name()}
			o, err := t.theOne(query)
			if err != nil {
				return err
			}
			if found, err = t.describe(o, query); err != nil {
				return err
			}
			// The first signature in this session need not look again.
			_, err = s.Memo(found.identity, func() (any, error) { return &located{o.handle, found.always.Load()}, nil })
			return err
		})
		switch {
		case errors.Is(err, ErrSession):
			return err
		case errors.Is(err, ErrKeyNotFound), errors.Is(err, ErrUnsupported):
			return sessionpool.Elsewhere(err)
		case err != nil:
			return err
		}
		key = found
		return nil
	})
	if err != nil {
		return nil, err
	}
	return key, nil
}

// describe reads what is known of a key object.
func (t token) describe(o object, query Query) (*material, error) {
	k := &material{query: query, class: o.class, label: o.label, id: o.id}
	err := error(nil)
	switch {
	case o.keyType == untold:
		err = fmt.Errorf("%w: the key with %s on %s tells no key type", ErrUnsupported, o, t.name)
	case o.class == pkcs11.CKO_SECRET_KEY:
		err = t.describeSecret(k, o)
	default:
		err = t.describePrivate(k, o)
	}
	if err != nil {
		return nil, err
	}
	k.identity, err = identify(k)
	return k, err
}

func (t token) describePrivate(k *material, o object) (err error) {
	switch o.keyType {
	case pkcs11.CKK_RSA, pkcs11.CKK_EC, ckkECEdwards:
	default:
		return fmt.Errorf("%w: the private key with %s on %s is of type %s", ErrUnsupported, o, t.name, nameKeyType(o.keyType))
	}
	if err := t.maySign(o); err != nil {
		return err
	}
	if k.public, err = t.publicKey(o); err != nil {
		return fmt.Errorf("the public key of the private key with %s on %s: %w", o, t.name, err)
	}
	if k.typ, err = typeOf(k.public); err != nil {
		return fmt.Errorf("the private key with %s on %s: %w", o, t.name, err)
	}
	k.always.Store(o.always)
	k.algorithms = publicAlgorithms(k.public)
	return nil
}

func (t token) describeSecret(k *material, o object) (err error) {
	switch o.keyType {
	case ckkGenericSecret, ckkSHA256HMAC, ckkSHA384HMAC, ckkSHA512HMAC:
	default:
		return fmt.Errorf("%w: the secret key with %s on %s is of type %s", ErrUnsupported, o, t.name, nameKeyType(o.keyType))
	}
	if err := t.maySign(o); err != nil {
		return err
	}
	size, there, err := t.ulong(o.handle, pkcs11.CKA_VALUE_LEN)
	if err != nil {
		return err
	}
	if !there {
		return fmt.Errorf("%w: the secret key with %s on %s does not tell its length", ErrUnsupported, o, t.name)
	}
	k.typ = hmacType(size)
	if k.algorithms = hmacAlgorithms(o.keyType, size); len(k.algorithms) == 0 {
		return fmt.Errorf("%w: the secret key with %s on %s has %d bytes, too few for its HMAC (RFC 7518 section 3.2)",
			ErrUnsupported, o, t.name, size)
	}
	if k.mark, err = t.mark(o.handle, k.algorithms[0]); err != nil {
		return fmt.Errorf("the secret key with %s on %s: %w", o, t.name, err)
	}
	return nil
}

// maySign refuses a key whose owner did not make it for signatures.
func (t token) maySign(o object) error {
	if !o.signs {
		return fmt.Errorf("%w: the key with %s on %s is not for signing (CKA_SIGN is false)", ErrUnsupported, o, t.name)
	}
	return nil
}

// markMessage is no JWS signing input, it has no dot: its code is worth nothing
// to anybody.
const markMessage = "hsmkey: which key is this?"

// markOf is the mark of a secret that is not on the HSM.
func markOf(secret []byte, algorithm Algorithm) []byte {
	mac := hmac.New(schemes[algorithm].id.hash.New, secret)
	mac.Write([]byte(markMessage))
	return mac.Sum(nil)
}

// mark tells one secret from another, without anybody seeing either: the code of
// a fixed message. Attributes cannot do that. CKA_CHECK_VALUE is often missing
// and three bytes long.
func (t token) mark(handle pkcs11.ObjectHandle, algorithm Algorithm) ([]byte, error) {
	s := schemes[algorithm]
	w := s.ways[0]
	mac, err := t.module.SignSingle(nil, t.session, w.mechanism, handle, []byte(markMessage), s.id.hash.Size())
	switch {
	case refuses(err):
		return nil, fmt.Errorf("%w: %w", ErrUnsupported, &refusal{w.name, err})
	case err != nil:
		return nil, &refusal{w.name, err}
	}
	return mac, nil
}

// located is where a key is in one session, during one login.
type located struct {
	handle pkcs11.ObjectHandle
	always bool // wants a login before each signature
}

// locate finds a known key in another session, and proves that it is the same
// one. Whatever was proven in other sessions says nothing here: handles may be
// of one session only, and objects may have been replaced since.
func (t token) locate(k *material) (*located, error) {
	found, err := t.candidates(k.query)
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		return nil, t.notFound(k.query)
	}
	var same []object
	var odd error
	for _, o := range found {
		if !o.readable() {
			odd = o.odd
			continue
		}
		ok, err := t.is(k, o)
		if err != nil {
			odd = err
		} else if ok {
			same = append(same, o)
		}
	}
	switch {
	case len(same) > 1:
		return nil, fmt.Errorf("%w: %s has the key with %s %d times", ErrAmbiguous, t.name, k.query, len(same))
	case len(same) == 0 && odd != nil:
		return nil, odd
	case len(same) == 0:
		return nil, fmt.Errorf("%w: %s has %s for another key than the one in use; it is not used", ErrKeyMismatch, t.name, k.query)
	}
	return &located{handle: same[0].handle, always: same[0].always}, nil
}

// is reports whether an object is a key that is known already.
func (t token) is(k *material, o object) (bool, error) {
	switch {
	case o.class != k.class:
		return false, nil
	case k.class == pkcs11.CKO_SECRET_KEY:
		mark, err := t.mark(o.handle, k.algorithms[0])
		return hmac.Equal(mark, k.mark), err
	}
	public, err := t.publicKey(o)
	if err != nil {
		return false, err
	}
	return samePublic(public, k.public), nil
}

// nameKeyType names the key types that are met on HSMs but do not sign tokens.
func nameKeyType(keyType uint) string {
	switch keyType {
	case pkcs11.CKK_DSA:
		return "DSA"
	case pkcs11.CKK_DH, pkcs11.CKK_X9_42_DH:
		return "Diffie-Hellman"
	case pkcs11.CKK_AES:
		return "AES"
	case pkcs11.CKK_DES, pkcs11.CKK_DES2, pkcs11.CKK_DES3:
		return "DES"
	}
	return fmt.Sprintf("0x%x", keyType)
}
