package balance

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"time"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// news wakes those who wait for things to change.
type news struct {
	channel atomic.Pointer[chan struct{}]
}

// next is closed at the next change.
func (n *news) next() <-chan struct{} { return *n.channel.Load() }

func (n *news) tell() {
	fresh := make(chan struct{})
	if old := n.channel.Swap(&fresh); old != nil {
		close(*old)
	}
}

// queue waits until those who came earlier have got a session. Only the first one
// waits at the pools: so they are served in their order, and not all of them
// stand in line everywhere.
func (b *Balancer) queue(ctx context.Context) error {
	select {
	case b.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ended(ctx, "waiting for a free session")
	}
}

func (b *Balancer) leave() { <-b.turn }

// await waits for the first session that is free at one of the members that were
// busy: a session may be held for long, and others come back meanwhile. Without
// session and error things have changed, or it is reprieve, and it is worth asking
// again.
func (b *Balancer) await(ctx context.Context, changed <-chan struct{}, reprieve time.Time, a *attempt) (*sessionpool.Session, error) {
	var over <-chan time.Time
	if !reprieve.IsZero() {
		timer := time.NewTimer(time.Until(reprieve))
		defer timer.Stop()
		over = timer.C
	}
	stop := make(chan struct{})
	defer close(stop)
	opts := slices.Concat(a.wish, []sessionpool.Option{sessionpool.WaitUntil(stop)})
	if a.usual {
		opts = append(opts, sessionpool.Idle()) // to open one is for visits
	}
	free, once := make(chan *sessionpool.Session), a.once
	for _, m := range a.busy {
		for _, c := range m.ways() {
			b.tasks.start(func() {
				s, err := c.pool.Acquire(ctx, opts...)
				if m.judge(ctx, once, c.explain(err)); err != nil && (busy(err) || errors.Is(err, sessionpool.ErrClosed)) {
					return
				}
				select {
				case free <- s:
				case <-stop: // another one was first
					if s != nil {
						s.Release()
					}
				}
			})
		}
	}
	select {
	case s := <-free:
		return s, nil
	case <-changed:
		return nil, nil
	case <-over:
		return nil, nil
	case <-ctx.Done():
		return nil, ended(ctx, "waiting for a free session")
	}
}
