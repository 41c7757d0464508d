package jws

import (
	"context"
	"time"
)

// climber finds the number of sessions from which on more do not pay: it doubles
// them while that makes the batch faster, and goes back to the best when it does
// not. After a while it tries once more, because HSMs come and go.
type climber struct {
	crew   *crew
	window *window

	sessions int     // the best number so far
	rate     float64 // its tokens per second
}

const (
	climbFor    = 100 * time.Millisecond // the shortest measurement
	climbTokens = 16                     // the fewest tokens in one
	climbGain   = 1.1                    // what doubling must bring
	climbAgain  = 5 * time.Second        // until the next try
	climbMost   = 256
)

func newClimber(c *crew, w *window) *climber { return &climber{crew: c, window: w, sessions: 1} }

func (c *climber) climb(ctx context.Context) {
	rate, ok := c.measure(ctx)
	if !ok {
		return
	}
	c.rate = rate
	for {
		for c.sessions < climbMost {
			up, ok := c.try(ctx, 2*c.sessions)
			if !ok {
				return
			}
			if !up {
				break
			}
		}
		c.crew.resize(c.sessions)
		if !c.pause(ctx, climbAgain) {
			return
		}
		if c.rate, ok = c.measure(ctx); !ok {
			return
		}
	}
}

// try measures with a number of sessions, twice before it gives up: one dip of
// a noisy machine is no plateau.
func (c *climber) try(ctx context.Context, sessions int) (up, ok bool) {
	c.crew.resize(sessions)
	for range 2 {
		rate, ok := c.measure(ctx)
		if !ok {
			return false, false
		}
		if rate > climbGain*c.rate {
			c.sessions, c.rate = sessions, rate
			return true, true
		}
	}
	return false, true
}

// measure waits until there are enough tokens for a rate; ok is false when the
// batch is over.
func (c *climber) measure(ctx context.Context) (rate float64, ok bool) {
	// What was begun with another number of sessions does not count.
	if !c.pause(ctx, climbFor/4) {
		return 0, false
	}
	begin, start := c.window.progress(), time.Now()
	for {
		if !c.pause(ctx, climbFor) {
			return 0, false
		}
		if tokens := c.window.progress() - begin; tokens >= climbTokens {
			return float64(tokens) / time.Since(start).Seconds(), true
		}
	}
}

// pause waits; it reports whether the batch still goes on.
func (c *climber) pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-c.window.over:
		return false
	case <-ctx.Done():
		return false
	}
}
