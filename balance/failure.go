package balance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// attempt is one caller's way through the fleet.
type attempt struct {
	wish  []sessionpool.Option // what the caller asked for
	opts  []sessionpool.Option // the same, without waiting
	usual bool                 // usual sessions will do, from the caches
	open  bool                 // to everybody: it needs no login
	once  bool                 // a one-time PIN is among it
	busy  []*member            // that answer, and have every session in use
	tried []*member            // that failed
	cause []error              // why
}

var idle, noWait = []sessionpool.Option{sessionpool.Idle()}, []sessionpool.Option{sessionpool.NoWait()}

// newAttempt begins an attempt. Usual sessions are taken from the caches, into
// which visits put them; others the caller opens himself.
func newAttempt(wish []sessionpool.Option, cached bool) attempt {
	a := attempt{wish: wish, opts: noWait}
	unusual := func(o sessionpool.Option) bool { return !o.Usual() }
	if a.usual = cached && !slices.ContainsFunc(wish, unusual); a.usual {
		a.opts = idle
	}
	if len(wish) > 0 {
		a.opts = slices.Concat(wish, a.opts)
		a.once = slices.ContainsFunc(wish, sessionpool.Option.OneTime)
		a.open = slices.ContainsFunc(wish, sessionpool.Option.NoLogin)
	}
	return a
}

// over takes note of how asking a member went. It reports whether that was the
// end of it: there is a session, or it makes no sense to ask another one. A
// one-time PIN may have been sent, and is not sent to another HSM.
func (a *attempt) over(ctx context.Context, m *member, err error) bool {
	switch {
	case err == nil, ctx.Err() != nil:
		return true
	case busy(err), errors.Is(err, sessionpool.ErrClosed): // the lists have changed, which is news
		a.busy = append(a.busy, m)
		return false
	case a.once && !errors.Is(err, sessionpool.ErrUnsuitable):
		return true
	}
	a.failed(m, err)
	return false
}

func (a *attempt) has(m *member) bool { return slices.Contains(a.tried, m) }

func (a *attempt) failed(m *member, err error) {
	if i := slices.Index(a.tried, m); i >= 0 {
		a.cause[i] = err
		return
	}
	a.tried = append(a.tried, m)
	a.cause = append(a.cause, err)
}

// passing reports whether what a member failed with may be over already. One that
// took all the time there is is not waited for twice.
func (a *attempt) passing(m *member) bool {
	return passing(a.cause[slices.Index(a.tried, m)])
}

func passing(err error) bool {
	return errors.Is(err, sessionpool.ErrSession) && !errors.Is(err, sessionpool.ErrTimeout) &&
		!errors.Is(err, sessionpool.ErrPIN) && !errors.Is(err, sessionpool.ErrUnsuitable)
}

// forget begins anew, when things have changed.
func (a *attempt) forget() { a.tried, a.cause = nil, nil }

// failure is why nobody answered.
func (f *fleet) failure(a *attempt) error {
	e := &FleetError{}
	for _, q := range f.lists {
		for _, m := range q.members {
			if i := slices.Index(a.tried, m); i >= 0 {
				e.add(m, a.cause[i])
			}
		}
	}
	return e
}

// failure is why the members of a list are suspended.
func (q *squad) failure() error {
	e := &FleetError{}
	for _, m := range q.members {
		if s := m.suspended.Load(); s != nil {
			e.add(m, s.cause)
		}
	}
	return e
}

// EndpointError is why one endpoint could not give a session.
type EndpointError struct {
	Endpoint string
	Err      error
}

// FleetError says that no endpoint could give a session, and why each could not.
//
// It matches what its causes match, leaving aside those of endpoints that work and
// have no session of the kind asked for ([sessionpool.ErrUnsuitable]) if there are
// others. It matches [sessionpool.ErrSession] too, unless all causes are the PIN's
// or all are [sessionpool.ErrUnsupported].
type FleetError struct {
	Causes []EndpointError // in the order of the lists
}

// add notes a cause; an endpoint that is in several lists comes once.
func (e *FleetError) add(m *member, cause error) {
	if !slices.ContainsFunc(e.Causes, func(c EndpointError) bool { return c.Endpoint == m.name }) {
		e.Causes = append(e.Causes, EndpointError{m.name, cause})
	}
}

func (e *FleetError) Error() string {
	var text strings.Builder
	text.WriteString("no HSM of the balance lists can be used")
	for _, c := range e.Causes {
		if said := c.Err.Error(); strings.HasPrefix(said, c.Endpoint) {
			text.WriteString("; " + said)
		} else {
			fmt.Fprintf(&text, "; %s: %s", c.Endpoint, said)
		}
	}
	return text.String()
}

// Unwrap makes errors.Is and errors.As find the causes.
func (e *FleetError) Unwrap() []error {
	all := func(sentinel error) bool {
		return !slices.ContainsFunc(e.Causes, func(c EndpointError) bool { return !errors.Is(c.Err, sentinel) })
	}
	unsuitable := all(sessionpool.ErrUnsuitable)
	var errs []error
	for _, c := range e.Causes {
		if unsuitable || !errors.Is(c.Err, sessionpool.ErrUnsuitable) {
			errs = append(errs, c.Err)
		}
	}
	if !all(sessionpool.ErrPIN) && !all(sessionpool.ErrUnsupported) {
		errs = append(errs, sessionpool.ErrSession)
	}
	return errs
}

var errBusy = fmt.Errorf("%w: every session is in use", sessionpool.ErrUnsuitable)

// busy reports whether err says that all sessions are in use, and no more than
// that.
func busy(err error) bool {
	return err != nil && errors.Is(err, sessionpool.ErrUnsuitable) &&
		!errors.Is(err, sessionpool.ErrSession) && !errors.Is(err, sessionpool.ErrUnsupported)
}

// ended explains that ctx ended: at its deadline that is a timeout.
func ended(ctx context.Context, what string) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("%w: %s: %w", sessionpool.ErrTimeout, what, ctx.Err())
	}
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		return fmt.Errorf("%s: %w: %w", what, ctx.Err(), cause)
	}
	return fmt.Errorf("%s: %w", what, ctx.Err())
}
