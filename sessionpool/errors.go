package sessionpool

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// The sentinels of this package. Every error it returns matches one of them
// with errors.Is, except the error of a function given to [Session.Do] that the
// session had no part in, which comes back as it is. Where a PKCS#11 call
// failed, its code can be had with errors.As to [pkcs11.Error].
var (
	// ErrConfig: the configuration cannot work: a missing or unloadable module,
	// no token or several that match, a number out of range, an unknown option.
	// Nothing was sent to the token.
	ErrConfig = errors.New("invalid configuration")

	// ErrPIN: the PIN could not be read, is empty, was rejected by the token,
	// differs from the one that the process is logged in with, or is not sent
	// because the token is locked, at its final try, or has rejected it before.
	ErrPIN = errors.New("PIN not accepted")

	// ErrSession: there is no usable session: the token or its HSM is gone, the
	// session was lost under the call, or too many calls hang in the module. It
	// is worth trying again, on another session.
	ErrSession = errors.New("no usable HSM session")

	// ErrTimeout: a PKCS#11 call, or the wait for a session, took longer than
	// Config.OpTimeout or the deadline of its context.
	ErrTimeout = errors.New("HSM operation timed out")

	// ErrUnsupported: the module, the token or the transport cannot do what was
	// asked.
	ErrUnsupported = errors.New("not supported by the HSM")

	// ErrUnsuitable: the pool works, but has no session of the kind that the
	// options ask for: Encrypted, Avoid, Idle, NoWait, WaitUntil. Another source may have one.
	ErrUnsuitable = errors.New("no such session here")

	// ErrClosed: the pool is closed, or the session was released or closed.
	ErrClosed = errors.New("closed")
)

// failure ties a sentence for the person to a sentinel and to the cause below
// it; both can be found with errors.Is and errors.As.
type failure struct {
	text     string
	sentinel error
	cause    error
}

func (f *failure) Error() string {
	if f.cause == nil {
		return f.text
	}
	return f.text + ": " + f.cause.Error()
}

func (f *failure) Unwrap() []error {
	if f.cause == nil {
		return []error{f.sentinel}
	}
	return []error{f.sentinel, f.cause}
}

// fail makes an error that matches sentinel and cause (which may be nil) and
// reads "text: cause".
func fail(sentinel, cause error, format string, args ...any) error {
	return &failure{text: fmt.Sprintf(format, args...), sentinel: sentinel, cause: cause}
}

// waitError explains why waiting on ctx ended: a deadline is a timeout, a
// cancellation is the caller's own wish and matches context.Canceled only.
func waitError(ctx context.Context, what string) error {
	cause := context.Cause(ctx)
	if slow := (*slowError)(nil); errors.As(cause, &slow) {
		return fail(ErrTimeout, slow, "%s", what)
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fail(ErrTimeout, errors.Join(cause, ctx.Err()), "%s", what)
	}
	if !errors.Is(cause, context.Canceled) {
		cause = errors.Join(cause, context.Canceled)
	}
	return fmt.Errorf("%s: %w", what, cause)
}

// interrupted is the error of an attempt during which ctx ended: whatever else went
// wrong then says nothing about the HSM.
func interrupted(ctx context.Context, err error) error {
	if errors.Is(err, ctx.Err()) {
		return err
	}
	return waitError(ctx, err.Error())
}

// slowError is the cause of a context that ends because a step of several
// PKCS#11 calls took longer than one call may.
type slowError struct{ timeout time.Duration }

func (e *slowError) Error() string { return fmt.Sprintf("longer than %v", e.timeout) }
