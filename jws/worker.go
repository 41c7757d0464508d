package jws

import (
	"context"
	"errors"
	"time"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// worker is one goroutine that signs, in one session at a time.
type worker struct {
	batch  *batch
	number int

	over  bool // there is no more for it to do
	most  int  // items to take at a time
	spare []*lot
}

// What a worker does for each of its lots costs as much as a few signatures: long
// lots make a fast batch. Where an HSM is waited for there is time enough for it,
// and short lots bring the tokens sooner.
const (
	shortLot = 4 * time.Millisecond
	longLot  = 64 * time.Millisecond // of a processor's time
)

// A worker keeps a session for this long. Then others who want one get their
// turn, and a balancer may send the worker to another HSM. Where the processors are
// what is short, beginning a turn costs some milliseconds until all are busy again:
// there it goes on for longer as long as nobody waits for a session.
const (
	turn     = 250 * time.Millisecond
	longTurn = 10 * time.Second
)

// How long a worker waits to try again when it finds no session while others
// sign. It doubles each time.
const (
	firstPause = 10 * time.Millisecond
	mostPause  = time.Second
)

// hands are the ways to sign in one session. many is [hsmkey.HSMJWK.SignJWSBatch],
// or nil.
type hands struct {
	one     signFunc
	many    func(ctx context.Context, next func() [][]byte, done func(signatures []byte)) error
	session *sessionpool.Session
}

// direct reports whether the library computes in this process.
func (h hands) direct() bool { return h.session != nil && h.session.Direct() }

// over reports whether a turn that began then is to end.
func (h hands) over(began time.Time) bool {
	switch took := time.Since(began); {
	case took < turn:
		return false
	case h.direct() && h.session.Token().Stats().Waiting == 0:
		return took >= longTurn
	}
	return true
}

// work signs for as long as there is something to sign and the crew wants this
// worker; own is the worker's, to wait for a session, ctx the batch's. A session
// that fails is replaced. When none can be had, and nobody signed anything in the
// meantime, that is the end of the batch.
func (w *worker) work(ctx, own context.Context) {
	b := w.batch
	pause := firstPause
	for !w.over {
		before := b.window.progress()
		err := b.signer.hold(own, func(h hands) error { return w.takeTurn(ctx, own, h) })
		switch {
		case err == nil:
			pause = firstPause
			continue
		case own.Err() != nil:
			return
		case !isLoss(err) || b.window.progress() == before:
			b.window.fail(err)
			return
		}
		select {
		case <-time.After(pause):
			pause = min(2*pause, mostPause)
		case <-own.Done():
			return
		}
	}
}

// isLoss reports whether an error says that a session or an HSM failed.
func isLoss(err error) bool {
	return errors.Is(err, hsmkey.ErrSession) || errors.Is(err, hsmkey.ErrTimeout)
}

// hold runs fn with a way to sign in one session, and again in another session
// when that one fails. A key that has no sessions to choose from, because it is
// pinned to one or no HSM's, signs as it always does.
func (s *Signer) hold(ctx context.Context, fn func(hands) error) error {
	var source sessionpool.Source
	if s.key != nil {
		source = s.key.Source()
	}
	if source == nil {
		return fn(hands{one: s.sign})
	}
	return sessionpool.Retry(ctx, source, func(session *sessionpool.Session) error {
		key := s.key.In(session)
		many := func(ctx context.Context, next func() [][]byte, done func([]byte)) error {
			return key.SignJWSBatch(ctx, s.alg, next, done)
		}
		return fn(hands{onHSM(key, s.alg), many, session})
	})
}

// takeTurn signs until the session's time is up or there is nothing left.
func (w *worker) takeTurn(ctx, own context.Context, h hands) error {
	if h.direct() {
		select {
		case w.batch.crew.computing <- struct{}{}:
			defer func() { <-w.batch.crew.computing }()
		case <-own.Done():
			return own.Err()
		}
	}
	for began := time.Now(); !h.over(began); {
		l := w.take(true)
		if l == nil {
			w.over = true
			return nil
		}
		var err error
		if h.many == nil || len(l.inputs) < 2 {
			err = w.signEach(ctx, h, l)
		} else {
			err = w.signLots(ctx, h, l, began)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// take takes a lot and prepares it. There is none when there is nothing left to
// sign, or, if the worker does not want to wait, nothing at the moment.
func (w *worker) take(wait bool) *lot {
	b := w.batch
	for {
		wanted, workers := b.crew.wants(w.number)
		if !wanted {
			return nil
		}
		l := &lot{}
		if n := len(w.spare); n > 0 {
			l, w.spare = w.spare[n-1], w.spare[:n-1]
		}
		l.items = b.window.take(l.items, max(w.most, 1), workers, wait)
		if len(l.items) == 0 {
			w.spare = append(w.spare, l)
			return nil
		}
		l.prepare(b)
		if len(l.inputs) > 0 {
			return l
		}
		w.put(l)
	}
}

// put gives the lot back with what became of it.
func (w *worker) put(l *lot) {
	w.batch.window.put(l.items)
	l.clear()
	w.spare = append(w.spare, l)
}

// signEach signs a lot item by item. What became of the items is in the window;
// the error is the session's or the HSM's, and the items that are not done are to
// be signed elsewhere.
func (w *worker) signEach(ctx context.Context, h hands, l *lot) error {
	defer w.put(l)
	began, signed := time.Now(), len(l.items)
	for i, input := range l.inputs {
		signature, err := h.one(ctx, input)
		switch {
		case err == nil:
			l.finish(i, signature)
		case isItems(err):
			l.fail(i, err)
		default:
			return err
		}
	}
	w.pace(h, signed, time.Since(began))
	return nil
}

// signLots signs a lot and those that follow it, until the session's time is up.
func (w *worker) signLots(ctx context.Context, h hands, first *lot, began time.Time) error {
	var begun []*lot
	last := time.Now()
	next := func() [][]byte {
		l := first
		if first = nil; l == nil && ctx.Err() == nil && !h.over(began) {
			l = w.take(false)
		}
		if l == nil {
			return nil
		}
		begun = append(begun, l)
		return l.inputs
	}
	done := func(signatures []byte) {
		l := begun[0]
		begun = begun[1:]
		now := time.Now()
		w.pace(h, len(l.items), now.Sub(last))
		last = now
		l.finishAll(signatures)
		w.put(l)
	}
	err := h.many(ctx, next, done)
	blame := err != nil && !isLoss(err) && ctx.Err() == nil
	for _, l := range begun {
		if !blame {
			w.put(l)
			continue
		}
		// One by one they tell who is to blame.
		err = w.signEach(ctx, h, l)
		blame = err == nil
	}
	return err
}

// pace chooses the size of the next lot by how long this one took. It grows
// slowly: the time may have been short by chance.
func (w *worker) pace(h hands, signed int, took time.Duration) {
	if h.many == nil {
		return
	}
	aim := shortLot
	if h.direct() {
		aim = w.batch.crew.lotTime()
	}
	each := max(took/time.Duration(signed), 1)
	w.most = min(int(aim/each)+1, 2*signed, mostLot)
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
