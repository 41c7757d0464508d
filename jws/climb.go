package jws

import (
	"context"
	"time"
)

// climber finds the number of sessions from which on more do not pay: it doubles
// them while that makes the batch faster, and goes back to the best when it does
// not. From time to time it tries half of them and, the next time, twice as many:
// HSMs come and go, and a measurement on a busy machine may have been wrong.
type climber struct {
	crew   *crew
	window *window

	sessions int     // the best number so far
	rate     float64 // its tokens per second
}

const (
	climbFor    = 150 * time.Millisecond // the shortest measurement
	climbTokens = 16                     // the fewest tokens in one
	climbGain   = 1.05                   // what doubling must bring, and halving may cost
	climbAgain  = 5 * time.Second        // until the next try
	climbMost   = 256
)

func newClimber(c *crew, w *window) *climber { return &climber{crew: c, window: w, sessions: 1} }

// climb goes on until the batch is over.
func (c *climber) climb(ctx context.Context) {
	c.crew.measuring(true)
	for down := false; ; down = !down {
		var ok bool
		if c.rate, ok = c.measure(ctx); !ok {
			return
		}
		if down { // one step: each costs a little
			_, ok = c.try(ctx, c.sessions/2, 1/climbGain)
		}
		for better := !down; better && ok; {
			better, ok = c.try(ctx, 2*c.sessions, climbGain)
		}
		if !ok {
			return
		}
		c.crew.resize(c.sessions)
		c.crew.measuring(false)
		if !c.pause(ctx, climbAgain) {
			return
		}
		c.crew.measuring(true)
		// What workers have before them from now on is short; each has two lots that
		// are not.
		if !c.pause(ctx, 3*longLot) {
			return
		}
	}
}

// try measures with another number of sessions, which is the better one if it has
// so many times the rate; twice before it gives up: one dip of a noisy machine is
// no plateau.
func (c *climber) try(ctx context.Context, sessions int, gain float64) (better, ok bool) {
	if sessions < 1 || sessions > climbMost {
		return false, true
	}
	c.crew.resize(sessions)
	for range 2 {
		rate, ok := c.measure(ctx)
		if !ok {
			return false, false
		}
		if rate > gain*c.rate {
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
