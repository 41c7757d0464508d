package sessionpool

import (
	"context"
	"sync"
	"time"
)

// sweeper closes the sessions of a token which have been idle for too long, traffic
// or not; with the last of them the anchor goes, so that no login lasts longer than
// its use. Between sweeps it is a timer and no goroutine.
type sweeper struct {
	mu       sync.Mutex
	timer    *time.Timer // nil: not scheduled yet
	stopped  bool
	sweeping sync.WaitGroup // added to with mu held, and not once it is stopped
}

func (s *sweeper) sweep(t *Token) {
	s.mu.Lock()
	if s.stopped {
		s.mu.Unlock()
		return
	}
	t.aside.Add(1)
	s.sweeping.Add(1)
	s.mu.Unlock()
	defer s.sweeping.Done()
	defer t.aside.Add(-1)
	t.sweep()
	s.schedule(t)
}

// schedule counts the time to the next sweep from now.
func (s *sweeper) schedule(t *Token) {
	s.mu.Lock()
	defer s.mu.Unlock()
	interval := sweepInterval(t.cache.idleTimeout())
	switch {
	case s.stopped:
	case s.timer == nil:
		s.timer = time.AfterFunc(interval, func() { s.sweep(t) })
	default:
		s.timer.Reset(interval)
	}
}

func (s *sweeper) stop() {
	s.mu.Lock()
	s.stopped = true
	s.timer.Stop()
	s.mu.Unlock()
	s.sweeping.Wait()
}

// sweepInterval is short enough for the timeout to be kept within a quarter.
func sweepInterval(idle time.Duration) time.Duration { return max(idle/4, time.Millisecond) }

func (t *Token) sweep() {
	then := time.Now().Add(-t.cache.idleTimeout())
	t.discardAll(t.cache.expired(then), CloseIdle)
	t.cache.unlower()
	if t.cache.unusedSince(then) {
		if anchor := t.takeAnchor(); anchor != nil {
			t.discard(anchor, CloseIdle)
		}
	}
}

// endUnusedLogin closes the anchor if no session is open beside it.
func (t *Token) endUnusedLogin() {
	if t.cache.takenPlaces() == 0 {
		if anchor := t.takeAnchor(); anchor != nil {
			t.discard(anchor, CloseAsked)
		}
	}
}

// closeAll closes what the last pool left behind, the anchor last: with it goes
// the login. It waits for calls that hang, but not longer than one may take.
func (t *Token) closeAll(ctx context.Context) error {
	t.discardAll(t.cache.expired(time.Time{}), CloseAsked)
	if anchor := t.takeAnchor(); anchor != nil {
		t.discard(anchor, CloseAsked)
	}
	nobody := t.aside.Load() == 0 // then it takes no time
	_, err := await(ctx, nobody, t.cache.opTimeout(), t.name+": waiting for calls that hang", func() (struct{}, error) {
		t.running.Wait()
		return struct{}{}, nil
	})
	return err
}
