package sessionpool

import (
	"context"
	"time"
)

// sweeper is the goroutine that closes the sessions of a token which have been
// idle for too long, traffic or not; with the last of them the anchor goes, so
// that no login lasts longer than its use.
type sweeper struct {
	quit    chan struct{}
	done    chan struct{}
	changed chan struct{} // told, without waiting, of another timeout
}

func (s *sweeper) start(t *Token) {
	s.quit, s.done, s.changed = make(chan struct{}), make(chan struct{}), make(chan struct{}, 1)
	go func() {
		defer close(s.done)
		timer := time.NewTimer(DefaultIdleTimeout)
		defer timer.Stop()
		for {
			timer.Reset(sweepInterval(t.cache.idleTimeout()))
			select {
			case <-s.quit:
				return
			case <-s.changed:
			case <-timer.C:
				t.sweep()
			}
		}
	}()
}

func (s *sweeper) change() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

func (s *sweeper) stop() {
	close(s.quit)
	<-s.done
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
	_, err := await(ctx, t.cache.opTimeout(), t.name+": waiting for calls that hang", func() (struct{}, error) {
		t.running.Wait()
		return struct{}{}, nil
	})
	return err
}
