package jws

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"runtime"

	"github.com/hsmkey/hsmkey"
)

// MaxBatchSessions is the most sessions that a batch may ask for.
const MaxBatchSessions = 1024

// BatchOptions says how a batch is signed. The zero value is usable.
type BatchOptions struct {
	// Sessions is the number of sessions to sign in. Zero: as many as pay off,
	// found out while signing, which takes a second or two. With a library that
	// computes in this process, no more of them sign at a time than there are
	// processors (GOMAXPROCS).
	Sessions int

	// Skip goes on after an item that cannot be signed. Without it, the first
	// one ends the batch, after the tokens before it.
	Skip bool

	// Prepare, when set, makes the payload of an item from what the input
	// holds. It is called by several goroutines at once, and again for an item
	// that has to be signed again; what it is given is valid until it returns,
	// and what it returns is its caller's. Its error is the item's.
	Prepare func(index int, item []byte) ([]byte, error)

	// OnSessions, when set, is told the number of sessions in use each time
	// that it changes.
	OnSessions func(int)
}

// ItemError is the error of one item of a batch.
type ItemError struct {
	Index int // in the input, from 0
	Err   error
}

func (e *ItemError) Error() string { return fmt.Sprintf("item %d: %v", e.Index, e.Err) }

// Unwrap returns the cause.
func (e *ItemError) Unwrap() error { return e.Err }

// Batch signs a stream of payloads into a stream of compact tokens, in the order
// of the input. Each of its sessions signs many tokens; at most a window of
// payloads and tokens is in memory, whatever the length of the input, so a slow
// reader slows down the signing. When a session or an HSM fails, its items are
// signed on another one: none is lost, none comes twice.
//
// An error in the sequence is an [*ItemError], after which the sequence ends
// unless opts.Skip is set, or it is about the batch as a whole and is the last
// element: the error of ctx, of the HSM ([hsmkey.ErrSession], [hsmkey.ErrTimeout],
// [hsmkey.ErrPIN] and so on), or [hsmkey.ErrConfig] for impossible options.
//
// The input runs on a goroutine of its own, which copies each item. Leaving the
// loop early, or an error, stops it when it yields next, and Batch waits for
// that, unless ctx has ended. Each range over the sequence is a batch of its own.
func (s *Signer) Batch(ctx context.Context, items iter.Seq[[]byte], opts BatchOptions) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		if opts.Sessions < 0 || opts.Sessions > MaxBatchSessions {
			yield("", fmt.Errorf("%w: %d sessions, want 0 (find out) to %d", hsmkey.ErrConfig, opts.Sessions, MaxBatchSessions))
			return
		}
		b := &batch{signer: s, opts: opts, window: newWindow()}
		b.run(ctx, items, yield)
	}
}

// batch is a Batch at work. The feeder's goroutine fills the window, workers
// sign what is in it, the caller's goroutine empties it.
type batch struct {
	signer *Signer
	opts   BatchOptions
	window *window
	crew   crew
}

func (b *batch) run(ctx context.Context, items iter.Seq[[]byte], yield func(string, error) bool) {
	ctx, cancel := context.WithCancel(ctx)
	stopOnDone := context.AfterFunc(ctx, func() { b.window.fail(interrupted(ctx)) })
	fed := make(chan struct{})
	go func() {
		defer close(fed)
		b.feed(items)
	}()
	b.crew.start(ctx, b)

	// Also when the loop's body panics.
	defer func() {
		gone := ctx.Err() != nil
		b.window.fail(errLeft)
		stopOnDone()
		cancel()
		b.crew.wait()
		if !gone {
			<-fed
		}
	}()
	b.deliver(yield)
}

var errLeft = errors.New("nobody reads the batch any more")

// interrupted is why ctx ended.
func interrupted(ctx context.Context) error {
	if cause := context.Cause(ctx); !errors.Is(cause, ctx.Err()) {
		return fmt.Errorf("signing a batch: %w: %w", ctx.Err(), cause)
	}
	return fmt.Errorf("signing a batch: %w", ctx.Err())
}

// feed runs the input. If that panics, or leaves its goroutine (runtime.Goexit),
// so does the range over the batch, as over the input itself.
func (b *batch) feed(items iter.Seq[[]byte]) {
	returned := false
	defer func() {
		if !returned {
			b.window.fail(&inputEnd{recover()})
		}
	}()
	for item := range items {
		if !b.window.add(item) {
			returned = true
			return
		}
	}
	returned = true
	b.window.finishInput()
}

// inputEnd says that the input did not return.
type inputEnd struct{ panicked any }

func (*inputEnd) Error() string { return "the input of the batch did not return" }

// repeat ends this goroutine as the input ended its own.
func (e *inputEnd) repeat() {
	if e.panicked != nil {
		panic(e.panicked)
	}
	runtime.Goexit()
}

// deliver yields the tokens in their order, and in the end why there are no more.
func (b *batch) deliver(yield func(string, error) bool) {
	var results []result
	index := 0
	for {
		var err error
		results, err = b.window.due(results[:0])
		for i := range results {
			r := &results[i]
			if r.err != nil {
				r.err = &ItemError{Index: index, Err: r.err}
			}
			if !yield(r.token, r.err) || r.err != nil && !b.opts.Skip {
				return
			}
			index++
		}
		var end *inputEnd
		switch {
		case errors.Is(err, errDone):
			return
		case errors.As(err, &end):
			end.repeat()
		case err != nil:
			yield("", err)
			return
		}
	}
}
