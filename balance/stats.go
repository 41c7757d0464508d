package balance

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// State is what a Balancer thinks of an endpoint.
type State string

// The states of endpoints.
const (
	Up           State = "up"
	SuspendedFor State = "suspended" // until EndpointStats.Until
	Draining     State = "draining"  // no list names it any more, and sessions are still in use
)

// Stats is a snapshot of a fleet.
type Stats struct {
	Lists    []ListStats
	Draining []EndpointStats // endpoints of old lists with sessions still open

	// Reloads by outcome.
	ReloadsSame, ReloadsChanged, ReloadsInvalid uint64
}

// ListStats is one balance list.
type ListStats struct {
	Path      string
	Current   bool
	Endpoints []EndpointStats
}

// EndpointStats is one endpoint.
type EndpointStats struct {
	Name  string
	State State
	Until time.Time // end of the suspension

	// Current values.
	Connections int // to the endpoint; those of RemoteP11Kit have one session each
	Open        int // sessions, those included that are being closed
	InUse       int
	Orphans     int // calls that hang

	// Cumulative values.
	Opened   uint64 // sessions, on the connections that there are now
	Failures uint64 // how often it was suspended
	LeftOut  uint64 // how often a key could not be used on it

	// LastError is why it was suspended last, or could bear no more
	// connections. It is kept when it answers again.
	LastError error
}

// Stats returns a snapshot.
func (b *Balancer) Stats() Stats {
	s := Stats{
		ReloadsSame: b.reloads.same.Load(), ReloadsChanged: b.reloads.changed.Load(),
		ReloadsInvalid: b.reloads.invalid.Load(),
	}
	listed := map[*member]bool{}
	if f := b.fleet.Load(); f != nil {
		listed = f.members()
		current := f.current.Load()
		for i, q := range f.lists {
			l := ListStats{Path: q.path, Current: int64(i) == current}
			for _, m := range q.members {
				l.Endpoints = append(l.Endpoints, m.stats())
			}
			s.Lists = append(s.Lists, l)
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, m := range b.members {
		if listed[m] {
			continue
		}
		if e := m.stats(); e.Open > 0 || e.Connections > 0 {
			e.State = Draining
			s.Draining = append(s.Draining, e)
		}
	}
	slices.SortFunc(s.Draining, func(a, b EndpointStats) int { return strings.Compare(a.Name, b.Name) })
	return s
}

func (m *member) stats() EndpointStats {
	e := EndpointStats{Name: m.name, State: Up, Failures: m.failures.Load(), LeftOut: m.leftOut.Load()}
	if s := m.last.Load(); s != nil {
		e.LastError = s.cause
	}
	if s := m.suspended.Load(); s != nil {
		e.State, e.Until = SuspendedFor, s.until
	}
	connections := slices.Concat(m.ways(), m.outOfService())
	e.Connections = len(connections)
	for _, c := range connections {
		p := c.pool.Stats()
		e.Open += p.Open
		e.InUse += p.InUse
		e.Opened += p.Opened
		e.Orphans += p.Orphans
	}
	return e
}

// Member is one endpoint of the fleet as a Source of its own, for what concerns
// each HSM: importing a key, deleting it, checking it.
type Member struct {
	Name    string
	List    string // path of its balance list
	Current bool   // that list is in use
	m       *member
}

var _ sessionpool.Source = Member{}

// Members lists the endpoints in the order of the lists. One that is in several
// lists comes once, with the first of them.
func (b *Balancer) Members() []Member {
	f := b.fleet.Load()
	if f == nil {
		return nil
	}
	var all []Member
	current := f.current.Load()
	for i, q := range f.lists {
		for _, m := range q.members {
			if !slices.ContainsFunc(all, func(e Member) bool { return e.m == m }) {
				all = append(all, Member{Name: m.name, List: q.path, Current: int64(i) == current, m: m})
			}
		}
	}
	return all
}

// State is what the Balancer thinks of the endpoint now: Up or SuspendedFor.
func (e Member) State() State {
	if e.m.suspended.Load() != nil {
		return SuspendedFor
	}
	return Up
}

// Acquire hands out a session of this endpoint, suspended or not.
func (e Member) Acquire(ctx context.Context, opts ...sessionpool.Option) (*sessionpool.Session, error) {
	b := e.m.balancer
	a := newAttempt(opts, !b.settings.Pool.DisableCache)
	for {
		changed := b.changed.next()
		s, err := e.m.take(ctx, &a)
		if busy(err) {
			s, err = e.m.grow(ctx, &a)
		}
		if !busy(err) {
			return s, err
		}
		a.busy = []*member{e.m}
		if s, err = b.await(ctx, changed, time.Time{}, &a); s != nil || err != nil {
			return s, err
		}
	}
}
