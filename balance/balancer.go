package balance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// Balancer hands out sessions of a fleet of HSMs. It is safe for concurrent use.
type Balancer struct {
	settings *settings
	guard    *sessionpool.PINGuard
	fleet    atomic.Pointer[fleet]
	reloader *reloader
	reloads  reloads

	mu      sync.Mutex
	members map[string]*member // every endpoint that was ever listed
	closed  bool
}

var _ sessionpool.Source = (*Balancer)(nil)

// fleet is what the lists of one moment amount to.
type fleet struct {
	source  Lists
	lists   []*squad
	current atomic.Int64 // the list in use
}

// squad is the members of one list.
type squad struct {
	path    string
	members []*member
	next    atomic.Uint64 // round robin
}

// New reads the balance lists. It connects to nothing: that happens with the
// first session.
//
// The error matches [sessionpool.ErrConfig]; about a list it is a *ListError.
func New(cfg Config) (*Balancer, error) {
	s, err := cfg.check()
	if err != nil {
		return nil, err
	}
	lists, err := LoadLists(cfg.Lists)
	if err != nil {
		return nil, err
	}
	if err := s.accept(lists); err != nil {
		return nil, err
	}
	b := &Balancer{settings: s, guard: s.Pool.PINGuard, members: map[string]*member{}}
	if b.guard == nil {
		b.guard = &sessionpool.PINGuard{}
	}
	b.fleet.Store(b.muster(lists))
	b.reloader = b.startReloader()
	return b, nil
}

// muster makes a fleet of lists. Endpoints that are known keep their members.
func (b *Balancer) muster(lists Lists) *fleet {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := &fleet{source: lists}
	for _, list := range lists {
		q := &squad{path: list.Path}
		for _, e := range list.Endpoints {
			key := e.String() + "\x00" + e.PINValue()
			m := b.members[key]
			if m == nil {
				m = newMember(e, b.settings, b.guard, b.emit)
				b.members[key] = m
			}
			q.members = append(q.members, m)
		}
		f.lists = append(f.lists, q)
	}
	return f
}

func (b *Balancer) emit(e Event) {
	if b.settings.OnEvent != nil {
		b.settings.OnEvent(e)
	}
}

// Acquire hands out a session of the next endpoint that answers: of the current
// list in turn, else of the next list, else of whichever endpoint answers after
// all. It waits only where every endpoint that answers has all its sessions in
// use.
//
// When nobody answers the error lists every endpoint with its own cause. It
// matches [sessionpool.ErrSession], or what the causes have in common, such as
// [sessionpool.ErrPIN].
func (b *Balancer) Acquire(ctx context.Context, opts ...sessionpool.Option) (*sessionpool.Session, error) {
	for {
		f := b.fleet.Load()
		if f == nil {
			return nil, fmt.Errorf("%w: the balancer is closed", sessionpool.ErrClosed)
		}
		s, err := f.acquire(ctx, b.emit, opts)
		if b.fleet.Load() == f {
			return s, err
		}
		// The lists changed meanwhile: sessions of old ones are not handed out.
		if s != nil {
			s.Close()
		}
	}
}

// acquire is Acquire for the lists of one moment.
func (f *fleet) acquire(ctx context.Context, emit func(Event), opts []sessionpool.Option) (*sessionpool.Session, error) {
	current := f.current.Load()
	var a attempt
	for i := range int64(len(f.lists)) {
		n := (current + i) % int64(len(f.lists))
		s, err := f.lists[n].acquire(ctx, &a, opts)
		if s == nil && err == nil {
			continue
		}
		if s != nil && i > 0 && !f.lists[current].alive() && f.current.CompareAndSwap(current, n) {
			emit(Event{Kind: ListSwitched, List: f.lists[n].path, Err: a.error()})
		}
		return s, err
	}
	return f.lastResort(ctx, &a, opts)
}

// attempt remembers who failed one caller, and why.
type attempt struct {
	tried  []*member
	causes []error
}

func (a *attempt) failed(m *member, err error) {
	a.tried = append(a.tried, m)
	a.causes = append(a.causes, err)
}

// acquire asks the members of one list in turn. Without session and error the
// list has nobody that answers.
func (q *squad) acquire(ctx context.Context, a *attempt, opts []sessionpool.Option) (*sessionpool.Session, error) {
	count := uint64(len(q.members))
	first := q.next.Add(1)
	for {
		var waitFor *member
		for i := range count {
			m := q.members[(first+i)%count]
			if slices.Contains(a.tried, m) || !m.admit() {
				continue
			}
			s, err := m.try(ctx, opts)
			switch {
			case err == nil:
				return s, nil
			case ctx.Err() != nil, errors.Is(err, sessionpool.ErrClosed):
				return nil, err
			case busy(err):
				if waitFor == nil {
					waitFor = m
				}
			default:
				a.failed(m, err)
			}
		}
		if waitFor == nil {
			return nil, nil
		}
		s, err := waitFor.wait(ctx, opts)
		switch {
		case err == nil:
			return s, nil
		case ctx.Err() != nil, errors.Is(err, sessionpool.ErrClosed):
			return nil, err
		case !busy(err):
			a.failed(waitFor, err)
		}
	}
}

// alive reports whether a member of the list is not suspended.
func (q *squad) alive() bool {
	for _, m := range q.members {
		if m.suspended.Load() == nil {
			return true
		}
	}
	return false
}

// lastResort asks everybody who was spared so far because of a suspension, all
// at once so that nobody waits for one dead HSM after the other.
func (f *fleet) lastResort(ctx context.Context, a *attempt, opts []sessionpool.Option) (*sessionpool.Session, error) {
	type answer struct {
		member  *member
		list    int
		session *sessionpool.Session
		err     error
	}
	asked := map[*member]bool{}
	for _, m := range a.tried {
		asked[m] = true
	}
	answers := make(chan answer)
	count := 0
	for list, q := range f.lists {
		for _, m := range q.members {
			if asked[m] {
				continue
			}
			asked[m] = true
			count++
			go func() {
				s, err := m.try(ctx, opts)
				if busy(err) {
					s, err = m.wait(ctx, opts)
				}
				answers <- answer{m, list, s, err}
			}()
		}
	}
	for i := range count {
		got := <-answers
		if got.err != nil {
			a.failed(got.member, got.err)
			continue
		}
		f.current.Store(int64(got.list))
		go func() { // the others come too late
			for range count - i - 1 {
				if late := <-answers; late.session != nil {
					late.session.Release()
				}
			}
		}()
		return got.session, nil
	}
	return nil, a.error()
}

// error is why nobody answered.
func (a *attempt) error() error {
	if len(a.causes) == 0 {
		return nil
	}
	e := &FleetError{}
	for i, m := range a.tried {
		e.Causes = append(e.Causes, EndpointError{Endpoint: m.name, Err: a.causes[i]})
	}
	return e
}

// EndpointError is why one endpoint could not give a session.
type EndpointError struct {
	Endpoint string
	Err      error
}

// FleetError says that no endpoint could give a session, and why each could
// not. It matches what its causes match; unless that is the same for all it
// matches [sessionpool.ErrSession] too.
type FleetError struct {
	Causes []EndpointError
}

func (e *FleetError) Error() string {
	var text strings.Builder
	text.WriteString("no HSM of the balance lists can be used")
	for _, c := range e.Causes {
		fmt.Fprintf(&text, "; %s: %v", c.Endpoint, c.Err)
	}
	return text.String()
}

// Unwrap makes errors.Is and errors.As find the causes.
func (e *FleetError) Unwrap() []error {
	errs := make([]error, 0, len(e.Causes)+1)
	pinsOnly := true
	for _, c := range e.Causes {
		errs = append(errs, c.Err)
		pinsOnly = pinsOnly && errors.Is(c.Err, sessionpool.ErrPIN)
	}
	if !pinsOnly {
		errs = append(errs, sessionpool.ErrSession)
	}
	return errs
}

// Close ends the reloading, refuses new sessions, waits for those in use, and
// closes every connection. When ctx ends first, it returns its error and the rest
// happens in the background. Closing twice is safe.
func (b *Balancer) Close(ctx context.Context) error {
	b.reloader.stop()
	b.fleet.Store(nil)
	b.mu.Lock()
	members := b.members
	b.closed = true
	b.mu.Unlock()
	var (
		group sync.WaitGroup
		mu    sync.Mutex
		errs  []error
	)
	for _, m := range members {
		group.Go(func() {
			if err := m.close(ctx); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, fmt.Errorf("%s: %w", m.name, err))
			}
		})
	}
	group.Wait()
	return errors.Join(errs...)
}
