package balance

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// member is an endpoint at work: its connections, and whether it may be asked
// for a session.
type member struct {
	name     string
	key      string // of the Balancer's members
	endpoint Endpoint
	balancer *Balancer
	most     int // connections

	suspended atomic.Pointer[suspension] // nil: up
	last      atomic.Pointer[suspension] // the latest, over or not
	failures  atomic.Uint64
	leftOut   atomic.Uint64

	connections atomic.Pointer[[]*connection] // replaced, with mu held

	mu       sync.Mutex
	listed   bool
	visiting *visit
	full     time.Time            // until then the HSM bears no more connections
	draining map[*connection]bool // out of service; true: closed, but calls hang
}

// suspension keeps callers away until a time.
type suspension struct {
	until time.Time
	cause error
}

func newMember(b *Balancer, key string, e Endpoint) *member {
	m := &member{name: e.String(), key: key, endpoint: e, balancer: b, most: 1, draining: map[*connection]bool{}}
	m.connections.Store(&[]*connection{})
	if e.ModulePath == "" && b.settings.Remote == RemoteP11Kit {
		// A p11-kit connection serves one call at a time: one for each session.
		if m.most = b.settings.Pool.MaxSessions; m.most == 0 {
			m.most = sessionpool.DefaultMaxSessions
		}
	}
	return m
}

// ways are the connections there are.
func (m *member) ways() []*connection { return *m.connections.Load() }

// suspend keeps callers away for a while. Of several who notice the same failure
// the first one counts: was is what each of them began with, nil for up.
func (m *member) suspend(was *suspension, cause error) {
	next := &suspension{time.Now().Add(m.balancer.settings.Suspend), cause}
	if !m.suspended.CompareAndSwap(was, next) {
		return
	}
	m.failures.Add(1)
	m.last.Store(next)
	m.balancer.changed.tell()
	if was == nil {
		m.balancer.emit(Event{Kind: Suspended, Endpoint: m.name, Err: cause})
	}
}

// postpone lengthens the suspension that a visitor began with, because he found
// every session in use and learned nothing.
func (m *member) postpone(was *suspension) {
	if was != nil {
		later := time.Now().Add(min(m.balancer.settings.Suspend, m.balancer.settings.opTimeout()))
		m.suspended.CompareAndSwap(was, &suspension{later, was.cause})
	}
}

// resume ends the suspension that a visitor began with.
func (m *member) resume(was *suspension) {
	if was != nil && m.suspended.CompareAndSwap(was, nil) {
		m.balancer.changed.tell()
		m.balancer.emit(Event{Kind: Resumed, Endpoint: m.name})
	}
}

// grow waits for a visit that makes one more session possible, if there may be
// one more, and takes a session that is not in use.
func (m *member) grow(ctx context.Context, a *attempt) (*sessionpool.Session, error) {
	v := m.more(a.open)
	if v == nil {
		return nil, errBusy
	}
	if err := m.waitFor(ctx, v); err != nil {
		return nil, err
	}
	return m.take(ctx, a)
}

// take takes a session of the first connection that has one.
func (m *member) take(ctx context.Context, a *attempt) (*sessionpool.Session, error) {
	used, full := false, error(nil)
	for _, c := range m.ways() {
		s, err := c.pool.Acquire(ctx, a.opts...)
		switch {
		case err == nil:
			return s, nil
		case busy(err):
			used = true
		case tooMany(err):
			full = err
		default:
			err = c.explain(err)
			m.judge(ctx, a.once, err)
			return nil, err
		}
	}
	if full != nil && !used {
		m.judge(ctx, a.once, full)
		return nil, full
	}
	return nil, errBusy
}

// tooMany reports whether the HSM bears no more sessions: where some are our own
// that is no worse than that they are in use.
func tooMany(err error) bool { return errors.Is(err, pkcs11.Error(pkcs11.CKR_SESSION_COUNT)) }

// judge keeps the books on whether the member answers.
func (m *member) judge(ctx context.Context, once bool, err error) {
	switch {
	case err == nil, errors.Is(err, sessionpool.ErrUnsuitable), errors.Is(err, sessionpool.ErrClosed):
	case ctx.Err() != nil: // which says nothing about the HSM
		m.balancer.changed.tell() // the place that the session was to have is free
	case once && !errors.Is(err, sessionpool.ErrSession) && !errors.Is(err, sessionpool.ErrTimeout):
		// A one-time PIN is the caller's own affair.
	default:
		m.suspend(nil, err)
	}
}

// suspendSluggish suspends those of which a call has nearly lasted for too long, when
// another one's has: whatever befell that one befell them, and nobody should wait
// for one HSM after the other.
func (b *Balancer) suspendSluggish() {
	f := b.fleet.Load()
	if f == nil {
		return
	}
	timeout := b.settings.opTimeout()
	for m := range f.members() {
		for _, c := range m.ways() {
			if lasts := c.pool.OldestCall(); m.suspended.Load() == nil && lasts > timeout*3/4 {
				m.suspend(nil, fmt.Errorf("%w: %s: a call lasts for %v, and another HSM's took longer than %v",
					sessionpool.ErrTimeout, m.name, lasts.Round(time.Millisecond), timeout))
			}
		}
	}
}

// notice hears from a pool what callers' use of sessions showed.
func (m *member) notice(c *connection, e sessionpool.Event) {
	switch e.Kind {
	case sessionpool.CallTimedOut:
		m.suspend(nil, fmt.Errorf("%w: %s: a call took longer than %v", sessionpool.ErrTimeout, m.name, m.balancer.settings.opTimeout()))
		m.balancer.suspendSluggish()
		if c.bridge != nil {
			c.bridge.Disconnect() // the call comes back, and is forgotten
		}
	case sessionpool.SessionClosed:
		m.balancer.changed.tell() // there is room for another one
	case sessionpool.OrphanReturned:
		m.balancer.changed.tell()
		m.outOfService() // of which it may have been the last
		m.balancer.forget(m)
	case sessionpool.HSMDown:
		m.suspend(nil, c.explain(e.Err))
	case sessionpool.LeftOut:
		m.leftOut.Add(1)
		m.balancer.emit(Event{Kind: LeftOut, Endpoint: m.name, Err: e.Err})
	}
	if hook := m.balancer.settings.Pool.OnEvent; hook != nil {
		hook(e)
	}
}

// enlist takes the member into service.
func (m *member) enlist() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.listed = true
}

// reset closes the sessions of the member once they are released.
func (m *member) reset() {
	for _, c := range m.ways() {
		m.balancer.tasks.start(c.pool.Reset)
	}
}

// retire takes the member out of service: its connections are closed once their
// sessions are released.
func (m *member) retire() {
	for _, c := range m.strip() {
		m.balancer.tasks.start(func() { _ = m.drain(c) }) // it is of no use to anybody any more
	}
	m.balancer.forget(m)
}

// over reports whether the member is out of service, and nothing is left of it.
func (m *member) over() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return !m.listed && m.visiting == nil && len(m.ways())+len(m.draining) == 0
}

// strip takes all connections out of service.
func (m *member) strip() []*connection {
	m.mu.Lock()
	defer m.mu.Unlock()
	ways := m.ways()
	for _, c := range ways {
		m.draining[c] = false
	}
	m.connections.Store(&[]*connection{})
	m.suspended.Store(nil)
	m.listed, m.full = false, time.Time{}
	return ways
}

// drain closes a connection that is out of service, as soon as it is not used.
func (m *member) drain(c *connection) error {
	err := c.close(m.balancer.settings.opTimeout())
	if c.bridge != nil {
		m.balancer.bridges.keep(c.bridge)
	}
	m.mu.Lock()
	m.draining[c] = true
	m.mu.Unlock()
	m.outOfService()
	m.balancer.forget(m)
	return err
}

// close ends the member's service for good. A visit that goes on ends by itself.
func (m *member) close() error {
	ways := m.strip()
	errs := make([]error, len(ways))
	var group sync.WaitGroup
	for i, c := range ways {
		group.Go(func() { errs[i] = m.drain(c) })
	}
	group.Wait()
	return errors.Join(errs...)
}

// add takes a connection into service, unless there is none any more.
func (m *member) add(c *connection) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.listed {
		ways := slices.Concat(m.ways(), []*connection{c})
		m.connections.Store(&ways)
	}
	return m.listed
}

// abandon takes a connection out of service in which calls hang.
func (m *member) abandon(c *connection) {
	m.mu.Lock()
	ways := slices.DeleteFunc(slices.Clone(m.ways()), func(other *connection) bool { return other == c })
	m.connections.Store(&ways)
	m.draining[c] = false
	m.mu.Unlock()
	m.balancer.tasks.start(func() { _ = m.drain(c) }) // it is of no use to anybody any more
}

// outOfService are the connections that are not closed yet, or in which calls
// hang.
func (m *member) outOfService() []*connection {
	m.mu.Lock()
	defer m.mu.Unlock()
	maps.DeleteFunc(m.draining, func(c *connection, closed bool) bool { return closed && !c.hangs() })
	return slices.Collect(maps.Keys(m.draining))
}
