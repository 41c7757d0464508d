package jws

import (
	"context"
	"encoding/base64"
	"errors"
	"runtime"
	"time"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// worker is one goroutine that signs, in one session at a time.
type worker struct {
	batch  *batch
	number int

	over   bool // there is no more for it to do
	most   int  // items to take at a time
	lot    []item
	buffer []byte   // what is signed of the lot
	inputs [][]byte // the same item by item
	places []int    // in the lot, of the inputs
	token  []byte
}

// item is one item of a lot.
type item struct {
	at      int
	payload []byte // valid while the worker has the item
	done    bool
	result
}

// The measures of a lot. What a worker does for each of its lots costs as much as
// a good part of a signature, and so does crossing from Go to C.
const (
	mostLot  = 128
	lotBytes = 64 << 10 // of payloads, unless a single one is larger
	lotTime  = 4 * time.Millisecond
)

// A worker keeps a session for this long. Then others who want one get their
// turn, and a balancer may send the worker to another HSM.
const turn = 250 * time.Millisecond

// How long a worker waits to try again when it finds no session while others
// sign. It doubles each time.
const (
	firstPause = 10 * time.Millisecond
	mostPause  = time.Second
)

// hands are the ways to sign in one session. many may be nil; it signs several
// inputs, all or none, into signatures that lie one after the other.
type hands struct {
	one  signFunc
	many func(ctx context.Context, inputs [][]byte) ([]byte, error)
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
		err := b.signer.hold(own, func(h hands) error { return w.takeTurn(ctx, h) })
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
		if session.Direct() {
			// A library that computes in this process finds its memory faster where
			// it is always the same thread that comes.
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
		}
		key := s.key.In(session)
		return fn(hands{onHSM(key, s.alg), func(ctx context.Context, inputs [][]byte) ([]byte, error) {
			return key.SignJWSBatch(ctx, s.alg, inputs)
		}})
	})
}

// takeTurn signs until the session's time is up or there is nothing left.
func (w *worker) takeTurn(ctx context.Context, h hands) error {
	b := w.batch
	start := time.Now()
	for now := start; now.Sub(start) < turn; {
		w.lot = w.lot[:0]
		if wanted, workers := b.crew.wants(w.number); wanted {
			w.lot = b.window.take(w.lot, max(w.most, 1), workers)
		}
		if len(w.lot) == 0 {
			w.over = true
			return nil
		}
		err := w.sign(ctx, h)
		b.window.put(w.lot)
		signed := len(w.lot)
		w.letGo()
		if err != nil {
			return err
		}
		begin := now
		now = time.Now()
		w.pace(h, signed, now.Sub(begin)/time.Duration(signed))
		// From a goroutine that never waits, the scheduler takes its processor
		// every 10 ms, also in C, and then watches over all of them for a while,
		// at the cost of a few percent.
		runtime.Gosched()
	}
	return nil
}

// pace chooses the size of the next lot by how long an item of this one took. It
// grows slowly: the time may have been short by chance.
func (w *worker) pace(h hands, signed int, each time.Duration) {
	if h.many == nil {
		return
	}
	w.most = min(int(lotTime/max(each, 1))+1, 2*signed, mostLot)
}

// letGo keeps nothing of the lot while the worker waits for the next.
func (w *worker) letGo() {
	clear(w.lot)
	clear(w.inputs)
	if cap(w.buffer) > 4*lotBytes { // an item was very large
		w.buffer, w.token = nil, nil
	}
}

// sign signs the lot. What became of the items is in them; err is the session's
// or the HSM's, and those that are not done are to be signed elsewhere.
func (w *worker) sign(ctx context.Context, h hands) error {
	w.prepare()
	if h.many != nil && len(w.inputs) > 1 {
		signatures, err := h.many(ctx, w.inputs)
		if err == nil {
			size := len(signatures) / len(w.inputs)
			for i := range w.inputs {
				w.finish(i, signatures[i*size:(i+1)*size])
			}
			return nil
		}
		if isLoss(err) || ctx.Err() != nil {
			return err
		}
		// One by one they tell who is to blame.
	}
	for i, input := range w.inputs {
		signature, err := h.one(ctx, input)
		switch {
		case err == nil:
			w.finish(i, signature)
		case isItems(err):
			it := &w.lot[w.places[i]]
			it.err, it.done = err, true
		default:
			return err
		}
	}
	return nil
}

// prepare writes what is signed of each item. An item that cannot be prepared is
// done.
func (w *worker) prepare() {
	b := w.batch
	w.buffer, w.inputs, w.places = w.buffer[:0], w.inputs[:0], w.places[:0]
	for i := range w.lot {
		it := &w.lot[i]
		payload := it.payload
		if b.opts.Prepare != nil {
			if payload, it.err = b.opts.Prepare(it.at, payload); it.err != nil {
				it.done = true
				continue
			}
		}
		begin := len(w.buffer)
		w.buffer = append(w.buffer, b.signer.prefix...)
		w.buffer = base64.RawURLEncoding.AppendEncode(w.buffer, payload)
		w.inputs = append(w.inputs, w.buffer[begin:])
		w.places = append(w.places, i)
	}
	// The buffer may have moved while it grew.
	begin := 0
	for i, input := range w.inputs {
		end := begin + len(input)
		w.inputs[i] = w.buffer[begin:end:end]
		begin = end
	}
}

// finish makes the token of an input.
func (w *worker) finish(i int, signature []byte) {
	w.token = append(append(w.token[:0], w.inputs[i]...), '.')
	w.token = base64.RawURLEncoding.AppendEncode(w.token, signature)
	it := &w.lot[w.places[i]]
	it.token, it.done = string(w.token), true
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
