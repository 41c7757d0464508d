package main

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

// benchWay is a way to sign, over and over. more begins a round and reports whether
// there is to be one; what comes before the first is not measured.
type benchWay func(ctx context.Context, more func() bool) error

// benchTurn is what came of a while of work: how long each round took.
type benchTurn struct {
	took    []time.Duration
	elapsed time.Duration // less than the sum when there are several at work
}

func (t *benchTurn) rate() float64 {
	return float64(len(t.took)) / max(t.elapsed, 1).Seconds()
}

// percentile is one of sorted times, in milliseconds.
func (t *benchTurn) percentile(p int) float64 {
	if len(t.took) == 0 {
		return 0
	}
	return float64(t.took[min(len(t.took)*p/100, len(t.took)-1)].Microseconds()) / 1000
}

// turnTime is how long a turn takes: shorter than what else a machine does in a row,
// longer than the signatures of most HSMs.
const turnTime = 100 * time.Millisecond

// takeTurns measures several ways with n goroutines, each for a duration. When there
// are several they take turns, the first to begin last the next time, so that what
// else the machine does hits all of them.
func takeTurns(ctx context.Context, n int, duration time.Duration, ways ...benchWay) ([][]benchTurn, error) {
	rounds := 1
	if len(ways) > 1 {
		rounds = max(1, int(duration/turnTime))
	}
	turns := make([][]benchTurn, len(ways))
	for range rounds {
		for i, way := range ways {
			turn, err := inParallel(ctx, n, duration/time.Duration(rounds), way)
			if err != nil {
				return nil, err
			}
			turns[i] = append(turns[i], turn)
		}
		slices.Reverse(ways)
		slices.Reverse(turns)
	}
	if rounds%2 == 1 {
		slices.Reverse(turns)
	}
	return turns, nil
}

// joinTurns is all turns of a way as if they were one.
func joinTurns(turns []benchTurn) *benchTurn {
	var all benchTurn
	for _, t := range turns {
		all.took = append(all.took, t.took...)
		all.elapsed += t.elapsed
	}
	return &all
}

// medianRatio compares the rates of two ways, turn by turn.
func medianRatio(ours, theirs []benchTurn) float64 {
	ratios := make([]float64, len(ours))
	for i := range ours {
		ratios[i] = ours[i].rate() / max(theirs[i].rate(), 1)
	}
	slices.Sort(ratios)
	return ratios[len(ratios)/2]
}

// inParallel has n goroutines at work for a while, from the first round of any of
// them.
func inParallel(ctx context.Context, n int, duration time.Duration, work benchWay) (benchTurn, error) {
	var (
		group      sync.WaitGroup
		begin      sync.Once
		start, end time.Time
		mu         sync.Mutex
		turn       benchTurn
		errs       []error
	)
	for range n {
		group.Go(func() {
			var took []time.Duration
			var last time.Time // when a round ended, or the first began
			err := work(ctx, func() bool {
				now := time.Now()
				begin.Do(func() { start = now })
				if !last.IsZero() {
					took = append(took, now.Sub(last))
				}
				last = now
				return now.Sub(start) < duration && ctx.Err() == nil
			})
			mu.Lock()
			defer mu.Unlock()
			turn.took = append(turn.took, took...)
			errs = append(errs, err)
			if len(took) > 0 && last.After(end) {
				end = last
			}
		})
	}
	group.Wait()
	turn.elapsed = end.Sub(start)
	return turn, errors.Join(errors.Join(errs...), ctx.Err())
}
