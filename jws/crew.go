package jws

import (
	"context"
	"runtime"
	"sync"
	"time"
)

// crew is the workers of a batch. Their number may change while they work.
type crew struct {
	group sync.WaitGroup
	hire  func(number int) context.CancelFunc

	// computing holds those who have the library compute in this process: not more
	// than there are processors, or they would only be in each other's way.
	computing chan struct{}

	mu      sync.Mutex
	wanted  int
	measure bool
	running map[int]context.CancelFunc
	report  func(int)
}

// start begins with the number of workers that the options ask for, or sends
// somebody to find the best one.
func (c *crew) start(ctx context.Context, b *batch) {
	c.running, c.report = map[int]context.CancelFunc{}, b.opts.OnSessions
	c.computing = make(chan struct{}, runtime.GOMAXPROCS(0))
	c.hire = func(number int) context.CancelFunc {
		own, cancel := context.WithCancel(ctx)
		c.group.Go(func() {
			defer func() {
				dismissed := own.Err() != nil && ctx.Err() == nil
				cancel()
				c.quit(number, dismissed)
			}()
			(&worker{batch: b, number: number}).work(ctx, own)
		})
		return cancel
	}
	if b.opts.Sessions > 0 {
		c.resize(b.opts.Sessions)
		return
	}
	c.resize(1)
	c.group.Go(func() { newClimber(c, b.window).climb(ctx) })
}

// resize changes the number of workers. Those that are too many end when they
// ask for work next, or stop waiting for a session.
func (c *crew) resize(wanted int) {
	c.mu.Lock()
	changed := c.wanted != wanted
	c.wanted = wanted
	for number := range wanted {
		if c.running[number] == nil {
			c.running[number] = c.hire(number)
		}
	}
	for number, cancel := range c.running {
		if number >= wanted {
			cancel()
		}
	}
	c.mu.Unlock()
	if changed && c.report != nil {
		c.report(wanted)
	}
}

// quit takes a worker off the list. One that was dismissed may be wanted again by
// now.
func (c *crew) quit(number int, dismissed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.running, number)
	if dismissed && number < c.wanted {
		c.running[number] = c.hire(number)
	}
}

// wants reports whether a worker is to go on, and how many there are to be.
func (c *crew) wants(number int) (yes bool, workers int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return number < c.wanted, c.wanted
}

// measuring says whether somebody measures how fast the crew is: what it does at a
// time must be short beside the measurement.
func (c *crew) measuring(yes bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.measure = yes
}

// lotTime is how long a lot is to take where the processors are what limits the
// crew.
func (c *crew) lotTime() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.measure {
		return shortLot
	}
	return longLot
}

func (c *crew) wait() { c.group.Wait() }
