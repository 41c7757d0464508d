package sessionpool

import (
	"context"
	"slices"
	"sync"
	"time"
)

// cache holds the sessions of one token that wait to be reused, newest last,
// and keeps count of the places: each session that is open, being opened or
// being closed has one, except the anchor and orphans. It makes no PKCS#11
// call; what it takes out, its caller closes.
type cache struct {
	mu      sync.Mutex
	idle    [kinds][]*physical
	places  int // taken
	orphans int // calls that nobody waits for any more
	hanging int // those of them that have lasted for longer than a call may
	limits  limits
	lowered int       // what the token itself turned out to allow, 0: nothing known
	freed   time.Time // when a place was last given up
	waiters []*waiter // in the order in which they came
}

// waiter is a caller without a place.
type waiter struct {
	kind  kind
	fresh bool
	idle  bool
	ready chan grant
}

// grant is what a caller gets: a session of its kind; or the right to open one,
// after evict (if any) was closed; or an error.
type grant struct {
	found, evict *physical
	err          error
}

var errBusy = fail(ErrUnsuitable, nil, "every session is in use")

// setLimits takes out what is idle beyond the new limit.
func (c *cache) setLimits(l limits) (excess []*physical) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.limits = l
	for c.places-len(excess) > c.limit() {
		p := c.oldest()
		if p == nil {
			break
		}
		excess = append(excess, p)
	}
	c.wake()
	return excess
}

func (c *cache) limit() int {
	if c.lowered > 0 {
		return min(c.lowered, c.limits.sessions)
	}
	return c.limits.sessions
}

// take finds a session for a caller: an idle one of its kind, or nil and the
// right to open one, after evict (if any) was closed. It waits for its turn
// until ctx ends, or closing or giveUp is closed. fresh callers take no idle one, idle
// callers open none.
func (c *cache) take(ctx context.Context, closing <-chan struct{}, giveUp <-chan struct{}, k kind, fresh, idle bool) (found, evict *physical, err error) {
	c.mu.Lock()
	if !c.mustQueue(idle) {
		if g, ok := c.takeNow(k, fresh, idle); ok {
			c.mu.Unlock()
			return g.found, g.evict, g.err
		}
	}
	select {
	case <-giveUp:
		c.mu.Unlock()
		return nil, nil, errBusy
	default:
	}
	w := &waiter{kind: k, fresh: fresh, idle: idle, ready: make(chan grant, 1)}
	c.waiters = append(c.waiters, w)
	// Newcomers queue behind others, who may want what this one does not.
	c.wake()
	c.mu.Unlock()

	select {
	case g := <-w.ready:
		return g.found, g.evict, g.err
	case <-ctx.Done():
		err = waitError(ctx, "waiting for a free session")
	case <-closing:
		err = errClosedPool
	case <-giveUp:
		err = errBusy
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case g := <-w.ready: // too late: pass it on
		switch {
		case g.found != nil:
			c.putLocked(g.found)
		case g.evict != nil:
			c.putLocked(g.evict)
		case g.err == nil:
			c.places--
		}
	default:
		c.waiters = slices.DeleteFunc(c.waiters, func(other *waiter) bool { return other == w })
	}
	c.wake()
	return nil, nil, err
}

// mustQueue reports whether a newcomer has to wait behind others. Those who wait
// for an idle session want no place.
func (c *cache) mustQueue(idle bool) bool {
	return slices.ContainsFunc(c.waiters, func(w *waiter) bool { return idle || !w.idle })
}

func (c *cache) takeNow(k kind, fresh, idle bool) (g grant, ok bool) {
	switch {
	case c.hanging >= c.limits.orphans:
		return grant{err: fail(ErrSession, nil, "%d calls hang in the PKCS#11 library, no more are made until one comes back", c.hanging)}, true
	case c.orphans >= c.limits.orphans:
		return grant{}, false // until one comes back, or turns out to hang
	}
	if !fresh {
		if p := c.pop(k); p != nil {
			return grant{found: p}, true
		}
	}
	if idle {
		return grant{}, false
	}
	if c.places < c.limit() {
		c.places++
		return grant{}, true
	}
	if p := c.oldest(); p != nil {
		return grant{evict: p}, true // its place goes with it
	}
	return grant{}, false
}

// pop takes the newest idle session of a kind.
func (c *cache) pop(k kind) *physical {
	stack := c.idle[k]
	if len(stack) == 0 {
		return nil
	}
	p := stack[len(stack)-1]
	stack[len(stack)-1] = nil
	c.idle[k] = stack[:len(stack)-1]
	return p
}

// oldest takes the session that has been idle for longest, of any kind.
func (c *cache) oldest() *physical {
	var from = -1
	for k, stack := range c.idle {
		if len(stack) > 0 && (from < 0 || stack[0].idleSince.Before(c.idle[from][0].idleSince)) {
			from = k
		}
	}
	if from < 0 {
		return nil
	}
	p := c.idle[from][0]
	c.idle[from] = slices.Delete(c.idle[from], 0, 1)
	return p
}

// wake serves waiters in their order for as long as it can. Those who open no
// session do not keep others from a place.
func (c *cache) wake() {
	for i := 0; i < len(c.waiters); {
		w := c.waiters[i]
		g, ok := c.takeNow(w.kind, w.fresh, w.idle)
		switch {
		case ok:
			c.waiters = slices.Delete(c.waiters, i, i+1)
			w.ready <- g
		case w.idle:
			i++
		default:
			return
		}
	}
}

// put makes a session idle, unless there are more than may be.
func (c *cache) put(p *physical) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.places > c.limit() {
		return false
	}
	c.putLocked(p)
	c.wake()
	return true
}

func (c *cache) putLocked(p *physical) {
	p.idleSince = time.Now()
	c.idle[p.kind] = append(c.idle[p.kind], p)
}

// free gives up the place of a session that is closed or was never opened.
func (c *cache) free() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.places--
	c.freed = time.Now()
	c.wake()
}

// unusedSince reports whether no session has been open since then.
func (c *cache) unusedSince(then time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.places == 0 && !c.freed.After(then)
}

// full takes note that the token refused one more session. It reports whether
// waiting for another one makes sense; then the place is given up.
func (c *cache) full() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.places <= 1 {
		return false
	}
	c.places--
	c.lowered = c.places
	c.wake()
	return true
}

// orphan counts a call that its caller left; its place is free for another one.
func (c *cache) orphan(place bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.orphans++
	if place {
		c.places--
	}
	c.wake()
}

// orphanHangs counts an orphan that has lasted for longer than a call may.
func (c *cache) orphanHangs() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hanging++
	c.wake()
}

func (c *cache) orphanReturned(hung bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.orphans--
	if hung {
		c.hanging--
	}
	c.wake()
}

// expired takes out what has been idle since before then, or, with a zero time,
// everything.
func (c *cache) expired(then time.Time) []*physical {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []*physical
	for k, stack := range c.idle {
		keep := stack[:0]
		for _, p := range stack {
			if then.IsZero() || p.idleSince.Before(then) {
				out = append(out, p)
			} else {
				keep = append(keep, p)
			}
		}
		clear(stack[len(keep):])
		c.idle[k] = keep
	}
	return out
}

// unlower forgets what the token itself turned out to allow: others may have
// closed their sessions since.
func (c *cache) unlower() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lowered = 0
	c.wake()
}

// snapshot is what Stats shows of the cache.
func (c *cache) snapshot(s *Stats) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, stack := range c.idle {
		s.Idle += len(stack)
	}
	s.Open, s.Orphans, s.Waiting, s.Limit = c.places, c.orphans, len(c.waiters), c.limit()
	s.InUse = c.places - s.Idle
}

// takenPlaces is the number of sessions beside the anchor and orphans.
func (c *cache) takenPlaces() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.places
}

func (c *cache) idleTimeout() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.limits.idle
}

// opTimeout is the strictest of the members.
func (c *cache) opTimeout() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.limits.op
}
