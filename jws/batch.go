package jws

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"iter"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// MaxBatchSessions is the most sessions that a batch may ask for.
const MaxBatchSessions = 1024

// BatchOptions says how a batch is signed. The zero value is usable.
type BatchOptions struct {
	// Sessions is the number of sessions to sign in. Zero: as many as pay off,
	// found out while signing, which takes a second or two.
	Sessions int

	// Skip goes on after an item that cannot be signed. Without it, the first
	// one ends the batch, after the tokens before it.
	Skip bool

	// Prepare, when set, makes the payload of an item from what the input
	// holds. It is called by several goroutines at once; what it is given is
	// valid until it returns, and what it returns until it is called for the
	// next item. Its error is the item's.
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
	stopOnDone := context.AfterFunc(ctx, func() {
		b.window.fail(fmt.Errorf("signing a batch: %w", context.Cause(ctx)))
	})
	fed := make(chan struct{})
	go func() {
		defer close(fed)
		for item := range items {
			if !b.window.add(item) {
				return
			}
		}
		b.window.finishInput()
	}()
	b.crew.start(ctx, b)

	b.deliver(yield)
	interrupted := ctx.Err() != nil
	b.window.fail(errLeft)
	stopOnDone()
	cancel()
	b.crew.wait()
	if !interrupted {
		<-fed
	}
}

var errLeft = errors.New("nobody reads the batch any more")

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
		switch {
		case errors.Is(err, errDone):
			return
		case err != nil:
			yield("", err)
			return
		}
	}
}

// work signs for as long as there is something to sign and the crew wants this
// worker; own is the worker's, to wait for a session, ctx the batch's. A session
// that fails is replaced; that nothing at all could be signed between two
// failures, attempt after attempt, ends the batch.
func (b *batch) work(ctx, own context.Context, number int) {
	w := &worker{batch: b, number: number}
	for {
		before := w.signed
		err := b.signer.hold(own, func(sign signFunc) error { return w.signAll(ctx, sign) })
		if err == nil || own.Err() != nil {
			return
		}
		lost := errors.Is(err, hsmkey.ErrSession) || errors.Is(err, hsmkey.ErrTimeout)
		if !lost || w.signed == before {
			b.window.fail(err)
			return
		}
	}
}

// hold runs fn with a way to sign in one session, and again in another session
// when that one fails. A key that has no sessions to choose from, because it is
// pinned to one or no HSM's, signs as it always does.
func (s *Signer) hold(ctx context.Context, fn func(signFunc) error) error {
	var source sessionpool.Source
	if s.key != nil {
		source = s.key.Source()
	}
	if source == nil {
		return fn(s.sign)
	}
	return sessionpool.Retry(ctx, source, func(session *sessionpool.Session) error {
		return fn(onHSM(s.key.In(session), s.alg))
	})
}

// worker is one goroutine that signs.
type worker struct {
	batch  *batch
	number int
	signed int
	buffer []byte
}

// signAll signs items of the window until there are none left.
func (w *worker) signAll(ctx context.Context, sign signFunc) error {
	b := w.batch
	for b.crew.wants(w.number) {
		at, payload, ok := b.window.take()
		if !ok {
			return nil
		}
		r, err := w.one(ctx, sign, at, payload)
		if err != nil {
			b.window.giveBack(at)
			return err
		}
		b.window.put(at, r)
		w.signed++
	}
	return nil
}

// one signs one item. Its own error is in the result; err is the session's or
// the HSM's, and the item is to be signed elsewhere.
func (w *worker) one(ctx context.Context, sign signFunc, at int, payload []byte) (r result, err error) {
	b := w.batch
	if b.opts.Prepare != nil {
		if payload, r.err = b.opts.Prepare(at, payload); r.err != nil {
			return r, nil
		}
	}
	enc := base64.RawURLEncoding
	input := enc.AppendEncode(append(w.buffer[:0], b.signer.prefix...), payload)
	w.buffer = input
	sig, err := sign(ctx, input)
	if err != nil {
		if isItems(err) {
			return result{err: err}, nil
		}
		return r, err
	}
	input = append(input, '.')
	w.buffer = enc.AppendEncode(input, sig)
	r.token = string(w.buffer)
	if cap(w.buffer) > keepBuffer {
		w.buffer = nil
	}
	return r, nil
}

// isItems reports whether a failed signature is the fault of its item: neither
// of the session or HSM, nor of the key, nor wanted by the caller.
func isItems(err error) bool {
	for _, other := range []error{
		hsmkey.ErrSession, hsmkey.ErrTimeout, hsmkey.ErrPIN, hsmkey.ErrClosed, hsmkey.ErrConfig, hsmkey.ErrUnsupported,
		hsmkey.ErrKeyNotFound, hsmkey.ErrKeyMismatch, hsmkey.ErrAmbiguous, context.Canceled, context.DeadlineExceeded,
	} {
		if errors.Is(err, other) {
			return false
		}
	}
	return true
}
