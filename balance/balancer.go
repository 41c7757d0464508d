package balance

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// Balancer hands out sessions of a fleet of HSMs. It is safe for concurrent use.
type Balancer struct {
	settings *settings
	guard    *sessionpool.PINGuard
	fleet    atomic.Pointer[fleet] // nil: closed
	changed  news                  // told when who can be asked, or asked again, changes
	turn     chan struct{}         // held by the first of those who wait
	tasks    tasks
	bridges  bridges
	reloader *reloader
	reloads  reloads

	mu      sync.Mutex
	members map[string]*member // every endpoint that is listed, or has not drained

	closing  sync.Once
	closed   chan struct{} // closed when Close is done
	closeErr error
}

var _ sessionpool.Source = (*Balancer)(nil)

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
	b := &Balancer{
		settings: s, guard: s.Pool.PINGuard, turn: make(chan struct{}, 1),
		members: map[string]*member{}, closed: make(chan struct{}),
	}
	if b.guard == nil {
		b.guard = &sessionpool.PINGuard{}
	}
	b.changed.tell()
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
				m = newMember(b, key, e)
				b.members[key] = m
			}
			m.enlist()
			q.members = append(q.members, m)
		}
		f.lists = append(f.lists, q)
	}
	return f
}

// forget drops a member of which nothing is left.
func (b *Balancer) forget(m *member) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if m.over() && b.members[m.key] == m {
		delete(b.members, m.key)
	}
}

func (b *Balancer) emit(e Event) {
	if b.settings.OnEvent != nil {
		b.settings.OnEvent(e)
	}
}

// Acquire hands out a session of the next endpoint that answers: of the current
// list in turn, else of the next list, else of whichever endpoint answers after
// all. Where every endpoint that answers has all its sessions in use, it waits for
// the first that is free, until ctx ends.
//
// When nobody answers the error is a *FleetError, with each endpoint's own cause.
// After Close it matches [sessionpool.ErrClosed].
func (b *Balancer) Acquire(ctx context.Context, opts ...sessionpool.Option) (*sessionpool.Session, error) {
	a := newAttempt(opts, !b.settings.Pool.DisableCache)
	first := false
	for {
		changed := b.changed.next()
		f := b.fleet.Load()
		if f == nil {
			return nil, errClosed
		}
		s, err := f.acquire(ctx, b, &a)
		switch {
		case b.fleet.Load() != f:
			// The lists changed meanwhile: sessions of old ones are not handed out.
			if s != nil {
				s.Close()
			}
			a.forget()
			continue
		case !busy(err):
			return s, err
		}
		if !first && len(opts) == 0 { // any session will do
			if err := b.queue(ctx); err != nil {
				return nil, err
			}
			defer b.leave()
			first = true
			a.forget() // that may have lasted, and who failed be back
			continue
		}
		s, err = b.await(ctx, changed, f.reprieve(), &a)
		if s != nil && b.fleet.Load() != f {
			s.Close()
			s = nil
		}
		if s != nil || err != nil {
			return s, err
		}
		a.forget() // who failed may be back
	}
}

var errClosed = fmt.Errorf("%w: the balancer is closed", sessionpool.ErrClosed)

// Close ends the reloading, refuses new sessions, waits for those in use, and
// closes every connection. When ctx ends first, it returns its error and the rest
// happens in the background. Closing twice is safe: the second call waits for the
// first.
func (b *Balancer) Close(ctx context.Context) error {
	b.closing.Do(func() {
		go func() {
			defer close(b.closed)
			b.closeErr = b.close()
		}()
	})
	select {
	case <-b.closed:
		return b.closeErr
	case <-ctx.Done():
		return ended(ctx, "closing the balancer")
	}
}

func (b *Balancer) close() error {
	b.reloader.stop()
	b.fleet.Store(nil)
	b.changed.tell()
	var (
		group sync.WaitGroup
		mu    sync.Mutex
		errs  []error
	)
	b.mu.Lock()
	members := slices.Collect(maps.Values(b.members)) // nobody musters any more
	b.mu.Unlock()
	for _, m := range members {
		group.Go(func() {
			if err := m.close(); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, fmt.Errorf("%s: %w", m.name, err))
			}
		})
	}
	group.Wait()
	b.tasks.end()
	b.bridges.close()
	return errors.Join(errs...)
}

// tasks are the goroutines of a Balancer, of which none begins after the end.
type tasks struct {
	mu     sync.Mutex
	ended  bool
	active sync.WaitGroup
}

// start runs a task on a goroutine of its own. It reports false after the end.
func (t *tasks) start(task func()) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.ended {
		t.active.Go(task)
	}
	return !t.ended
}

// end returns when every task has ended.
func (t *tasks) end() {
	t.mu.Lock()
	t.ended = true
	t.mu.Unlock()
	t.active.Wait()
}
