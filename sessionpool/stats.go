package sessionpool

import (
	"sync/atomic"
	"time"
)

// Stats is a snapshot of a token's sessions. Pools on the same token show the
// same numbers.
type Stats struct {
	// Current values.
	Open     int // places taken: sessions in use, idle, being opened or closed; without the anchor
	Idle     int // sessions in the cache
	InUse    int // Open without Idle
	Waiting  int // callers that wait for a session
	Orphans  int // sessions whose caller left during a call that has not come back
	Limit    int // the most that Open may reach now
	LoggedIn bool
	// PINVerified says that the token itself accepted the PIN. It is false
	// while nobody is logged in, and after adopting a module in which somebody
	// else was logged in already.
	PINVerified bool

	// Cumulative values.
	Opened      uint64 // physical sessions opened, the anchor's too
	Reused      uint64 // sessions handed out from the cache
	ClosedAsked uint64 // closed by Close, Bypass, without cache, or with the pool
	ClosedIdle  uint64 // closed by the idle timeout
	ClosedLost  uint64 // closed because session, login, token or HSM were lost
	ClosedLimit uint64 // closed to make room for another kind, or to keep a smaller limit
	Logins      uint64 // logins that succeeded
	Recoveries  uint64 // calls made again on a renewed session, unnoticed by the caller
	Timeouts    uint64 // calls that took longer than OpTimeout
}

// counters are the cumulative values of Stats.
type counters struct {
	opened, reused, logins, recoveries, timeouts atomic.Uint64
	closedBy                                     [CloseLimit + 1]atomic.Uint64
}

func (c *counters) closed(cause CloseCause) { c.closedBy[cause].Add(1) }

// Stats returns a snapshot of the pool's token.
func (p *Pool) Stats() Stats { return p.token.Stats() }

// Stats returns a snapshot.
func (t *Token) Stats() Stats {
	s := Stats{
		Opened: t.counts.opened.Load(), Reused: t.counts.reused.Load(), Logins: t.counts.logins.Load(),
		Recoveries: t.counts.recoveries.Load(), Timeouts: t.counts.timeouts.Load(),
		ClosedAsked: t.counts.closedBy[CloseAsked].Load(), ClosedIdle: t.counts.closedBy[CloseIdle].Load(),
		ClosedLost: t.counts.closedBy[CloseLost].Load(), ClosedLimit: t.counts.closedBy[CloseLimit].Load(),
	}
	t.cache.snapshot(&s)
	t.login.mu.Lock()
	s.LoggedIn = t.login.done.Load()
	s.PINVerified = s.LoggedIn && t.login.verified
	t.login.mu.Unlock()
	return s
}

// OldestCall is how long the oldest call lasts that goes on in a session of the
// pool's token, 0 if none does. One that is near Config.OpTimeout is about to be
// given up.
func (p *Pool) OldestCall() time.Duration { return p.token.library.handles.oldestCall(p.token) }

// orphaned takes a session off the books whose call does not come back.
func (t *Token) orphaned(p *physical) {
	t.cache.orphan(p.place)
	t.suspicion.Add(1)
	if p.anchor {
		t.login.mu.Lock()
		if t.login.anchor == p {
			t.login.anchor = nil
			t.login.done.Store(false)
		}
		t.login.mu.Unlock()
	}
}

func (t *Token) timedOut() {
	t.counts.timeouts.Add(1)
	t.emit(Event{Kind: CallTimedOut})
}

func (t *Token) orphanReturned(hung bool) {
	t.cache.orphanReturned(hung)
	t.emit(Event{Kind: OrphanReturned})
}
