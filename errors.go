package hsmkey

import (
	"context"
	"errors"
	"fmt"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// Sentinels of the layers below, under the names of this package, so that its
// users need no other import. They are the same values.
var (
	// ErrConfig: the configuration cannot work: a missing module, no token or
	// several that match, an environment variable that cannot be parsed.
	ErrConfig = sessionpool.ErrConfig

	// ErrPIN: the PIN could not be read, is empty, or was rejected.
	ErrPIN = sessionpool.ErrPIN

	// ErrSession: there is no usable session: the HSM is down or out of reach.
	ErrSession = sessionpool.ErrSession

	// ErrTimeout: the HSM took longer than the configured time or the context's
	// deadline.
	ErrTimeout = sessionpool.ErrTimeout

	// ErrUnsupported: the HSM, the key or this package cannot do what was asked:
	// an algorithm that does not belong to the key, a mechanism that the token
	// lacks, an elliptic curve that JOSE does not know.
	ErrUnsupported = sessionpool.ErrUnsupported

	// ErrClosed: the HSM, or the session that the key is pinned to, was closed.
	ErrClosed = sessionpool.ErrClosed
)

// Sentinels of this package. Where a PKCS#11 call failed, its code can be had
// with errors.As to [pkcs11.Error] from github.com/miekg/pkcs11.
var (
	// ErrKeyNotFound: no private or secret key matches the query, or the key's
	// public half is nowhere on the token. It is never the answer of an HSM that
	// could not be asked: that is ErrSession or ErrTimeout.
	ErrKeyNotFound = errors.New("key not found")

	// ErrAmbiguous: more than one key matches, or more than one public key claims
	// to belong to a private key. A key that the token finds by label or id and does
	// not let us read counts: it may be the one that was meant. Nothing is chosen by
	// luck.
	ErrAmbiguous = errors.New("more than one key matches")

	// ErrKeyMismatch: a token holds another key under the name of the one that
	// is in use. It does not sign with it.
	ErrKeyMismatch = errors.New("another key has this name")

	// ErrExists: a key with this label or id is there already, or was made by another
	// process at the same time; nothing was made, or it was removed again.
	ErrExists = errors.New("key exists already")

	// ErrInvalid: an argument cannot be used: an empty label, a PEM file that
	// holds no private key, a digest whose length does not fit its hash; nothing
	// was sent to the HSM. Or the HSM refused it: a message that is too long for it.
	ErrInvalid = errors.New("invalid input")

	// ErrMAC: [HSMJWK.VerifyMAC] computed another code than the one given.
	ErrMAC = errors.New("the message authentication code does not match")
)

// ended is the error of a context that ended: its deadline is a timeout like any
// other, its cancellation the caller's own wish.
func ended(ctx context.Context, doing string) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("%w: %s: %w", ErrTimeout, doing, ctx.Err())
	}
	return fmt.Errorf("%s: %w", doing, ctx.Err())
}
