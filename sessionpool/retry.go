package sessionpool

import (
	"context"
	"errors"
	"fmt"
)

// attempts bounds Retry: a fleet has sixteen endpoints a list at most.
const attempts = 16

// Retry runs fn with a session from src, and again with another one when the
// session or the HSM under it failed ([ErrSession], [ErrTimeout]) or fn said
// [Elsewhere]. It is for what may safely be done twice: signing, reading; never
// for making or deleting keys. It gives up when ctx ends, when src has no
// session, or after a bounded number of attempts, with the last error.
func Retry(ctx context.Context, src Source, fn func(*Session) error, opts ...Option) error {
	var elsewhere error
	for attempt := 1; ; attempt++ {
		s, err := src.Acquire(ctx, opts...)
		switch {
		case err == nil:
		case elsewhere != nil && errors.Is(err, ErrUnsuitable):
			return elsewhere // all have been asked
		case elsewhere != nil:
			return fmt.Errorf("%w; and %s", err, elsewhere) //nolint:errorlint // perhaps one that was not asked has it
		default:
			return err
		}
		err = using(s, fn)
		var mark *elsewhereError
		switch {
		case err == nil:
			return nil
		case errors.As(err, &mark):
			elsewhere = err
			s.Token().emit(Event{Kind: LeftOut, Err: err})
			opts = append(opts[:len(opts):len(opts)], Avoid(s.Token()))
		case !errors.Is(err, ErrSession) && !errors.Is(err, ErrTimeout):
			return err
		}
		switch {
		case ctx.Err() != nil:
			return interrupted(ctx, err)
		case attempt == attempts:
			return err
		}
	}
}

// using runs fn and releases its session on every path.
func using(s *Session, fn func(*Session) error) error {
	defer s.Release()
	return fn(s)
}

// Elsewhere marks an error of this token only: the key is not there, or is
// another one, or the mechanism is not supported. Another token may do better.
func Elsewhere(err error) error { return &elsewhereError{err} }

type elsewhereError struct{ error }

func (e *elsewhereError) Unwrap() error { return e.error }
