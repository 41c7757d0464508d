package balance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hsmkey/hsmkey/internal/bridge"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// member is an endpoint at work: its connections, and whether it may be asked
// for a session. It lives as long as the Balancer, also while no list names it,
// because what a process has loaded cannot be unloaded.
type member struct {
	name     string
	endpoint Endpoint
	settings *settings
	guard    *sessionpool.PINGuard
	most     int // connections
	emit     func(Event)

	suspended atomic.Pointer[suspension] // nil: up
	failures  atomic.Uint64

	mu          sync.Mutex
	connections []*connection
	bridges     []*bridge.Bridge // of attempts that failed, for the next ones
	opening     chan struct{}    // closed when the connection that is being opened is there, or not
	next        int
	closed      bool
	down        chan struct{} // closed when the member is suspended
	last        error         // why it was suspended last
}

// suspension keeps callers away until a time, and then lets one of them try.
type suspension struct {
	until   time.Time
	probing atomic.Bool
}

func newMember(e Endpoint, s *settings, guard *sessionpool.PINGuard, emit func(Event)) *member {
	m := &member{
		name: e.String(), endpoint: e, settings: s, guard: guard, emit: emit,
		most: 1, down: make(chan struct{}),
	}
	if e.ModulePath == "" && s.Remote == RemoteP11Kit {
		// A p11-kit connection serves one call at a time: one for each session.
		if m.most = s.Pool.MaxSessions; m.most == 0 {
			m.most = sessionpool.DefaultMaxSessions
		}
	}
	return m
}

// admit reports whether a caller may ask the member for a session now. Who is
// admitted must say how it went: answered, suspend, or undecided.
func (m *member) admit() bool {
	s := m.suspended.Load()
	return s == nil || !time.Now().Before(s.until) && s.probing.CompareAndSwap(false, true)
}

// answered takes note of a session that was opened.
func (m *member) answered() {
	if m.suspended.Load() == nil {
		return
	}
	m.mu.Lock()
	was := m.suspended.Swap(nil)
	if was != nil {
		m.down = make(chan struct{})
	}
	m.mu.Unlock()
	if was != nil {
		m.emit(Event{Kind: Resumed, Endpoint: m.name})
	}
}

// suspend keeps callers away for a while, and sends those who wait elsewhere.
func (m *member) suspend(cause error) {
	m.failures.Add(1)
	m.mu.Lock()
	was := m.suspended.Swap(&suspension{until: time.Now().Add(m.settings.Suspend)})
	m.last = cause
	if was == nil {
		close(m.down)
	}
	m.mu.Unlock()
	if was == nil {
		m.emit(Event{Kind: Suspended, Endpoint: m.name, Err: cause})
	}
}

// undecided ends an attempt that says nothing about the member.
func (m *member) undecided() {
	if s := m.suspended.Load(); s != nil {
		s.probing.Store(false)
	}
}

// notice hears from a pool what callers' use of sessions showed.
func (m *member) notice(c *connection, e sessionpool.Event) {
	switch e.Kind {
	case sessionpool.CallTimedOut:
		m.suspend(fmt.Errorf("%w: a call did not come back in time", sessionpool.ErrTimeout))
		if c.bridge != nil {
			c.bridge.Disconnect() // calls that hang come back, and can be forgotten
		}
	case sessionpool.HSMDown:
		m.suspend(e.Err)
	}
	if hook := m.settings.Pool.OnEvent; hook != nil {
		hook(e)
	}
}

var (
	errBusy      = fmt.Errorf("%w: every session is in use", sessionpool.ErrUnsuitable)
	errSuspended = errors.New("the HSM was suspended meanwhile")
)

// busy reports whether err says that all sessions are in use, and no more than
// that.
func busy(err error) bool {
	return errors.Is(err, sessionpool.ErrUnsuitable) && !errors.Is(err, sessionpool.ErrSession) &&
		!errors.Is(err, sessionpool.ErrUnsupported)
}

// try asks the member for a session without waiting for others to release
// theirs, and keeps the books on whether it answered.
func (m *member) try(ctx context.Context, opts []sessionpool.Option) (*sessionpool.Session, error) {
	s, err := m.acquire(ctx, opts)
	m.judge(ctx, err)
	return s, err
}

func (m *member) judge(ctx context.Context, err error) {
	switch {
	case err == nil:
		m.answered()
	case ctx.Err() != nil, errors.Is(err, sessionpool.ErrUnsuitable), errors.Is(err, sessionpool.ErrClosed):
		m.undecided()
	default:
		m.suspend(err)
	}
}

// acquire takes a session from the first connection that has a free one, or
// opens a connection.
func (m *member) acquire(ctx context.Context, opts []sessionpool.Option) (*sessionpool.Session, error) {
	opts = append(opts[:len(opts):len(opts)], sessionpool.NoWait())
	for {
		m.mu.Lock()
		connections, closed, opening := m.connections, m.closed, m.opening
		if closed {
			m.mu.Unlock()
			return nil, fmt.Errorf("%w: the balancer is closed", sessionpool.ErrClosed)
		}
		m.mu.Unlock()
		for _, c := range connections {
			if s, err := c.pool.Acquire(ctx, opts...); err == nil || !busy(err) {
				return s, err
			}
		}
		if len(connections) == m.most || opening != nil {
			return nil, errBusy
		}
		if err := m.open(ctx); err != nil {
			return nil, err
		}
	}
}

// open adds a connection, unless somebody else is at it.
func (m *member) open(ctx context.Context) error {
	m.mu.Lock()
	if m.closed || m.opening != nil || len(m.connections) == m.most {
		m.mu.Unlock()
		return nil
	}
	done := make(chan struct{})
	m.opening = done
	m.mu.Unlock()

	c, err := m.connect(ctx)

	m.mu.Lock()
	closed := m.closed
	if err == nil && !closed {
		m.connections = append(slices.Clip(m.connections), c)
	}
	m.opening = nil
	close(done)
	m.mu.Unlock()
	if err == nil && closed {
		err = c.close(context.WithoutCancel(ctx))
	}
	return err
}

// wait waits for a session that others release, until ctx ends or the member is
// suspended.
func (m *member) wait(ctx context.Context, opts []sessionpool.Option) (*sessionpool.Session, error) {
	m.mu.Lock()
	down, opening := m.down, m.opening
	var c *connection
	if len(m.connections) > 0 {
		m.next++
		c = m.connections[m.next%len(m.connections)]
	}
	m.mu.Unlock()
	if c == nil {
		if opening != nil {
			select {
			case <-opening:
			case <-down:
			case <-ctx.Done():
			}
		}
		return m.try(ctx, opts)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-down:
			cancel(errSuspended)
		case <-ctx.Done():
		}
	}()
	s, err := c.pool.Acquire(ctx, opts...)
	if err != nil && errors.Is(context.Cause(ctx), errSuspended) {
		return nil, fmt.Errorf("%w: %s: %w", sessionpool.ErrSession, m.name, errSuspended)
	}
	m.judge(ctx, err)
	return s, err
}

// reset closes the sessions of the member, once they are released.
func (m *member) reset() {
	m.mu.Lock()
	connections := m.connections
	m.mu.Unlock()
	for _, c := range connections {
		c.pool.Reset()
	}
}

func (m *member) close(ctx context.Context) error {
	m.mu.Lock()
	connections, bridges := m.connections, m.bridges
	m.closed, m.connections, m.bridges = true, nil, nil
	m.mu.Unlock()
	for _, b := range bridges {
		_ = b.Close() // nothing goes over it
	}
	errs := make([]error, len(connections))
	var group sync.WaitGroup
	for i, c := range connections {
		group.Go(func() { errs[i] = c.close(ctx) })
	}
	group.Wait()
	return errors.Join(errs...)
}
