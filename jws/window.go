package jws

import (
	"errors"
	"sync"
	"time"
)

// The window of a batch. It is larger than what any number of sessions signs at
// a time, so that one slow item does not hold up the others.
const (
	windowItems = 4 * MaxBatchSessions
	windowBytes = 8 << 20 // of payloads, unless a single one is larger
	keepBuffer  = 16 << 10
)

// window is the part of a batch that is in memory: items before head were
// delivered, those before fresh are signed or being signed, those before tail
// wait. All positions count items of the whole batch.
//
// Waking somebody costs as much as a good part of a signature, so the feeder and
// the reader are not woken for each item: the feeder when half of the window is
// free, the reader when a worker runs out of work; else it looks by itself.
type window struct {
	mu   sync.Mutex
	room sync.Cond     // the feeder waits for it
	work sync.Cond     // workers wait for it
	news chan struct{} // the reader waits for it

	slots             []slot // a ring
	head, fresh, tail int
	returned          []int // to be signed again
	bytes             int   // of payloads in the window
	signed            int   // results so far
	idle              int   // workers that wait
	full              bool  // the feeder waits
	ended             bool  // the input has
	err               error // why the batch is over
	over              chan struct{}
}

// slot is one item. Its payload is written by the feeder before the item is
// taken, and read by the one worker that took it.
type slot struct {
	payload []byte
	done    bool
	result
}

type result struct {
	token string
	err   error
}

func newWindow() *window {
	w := &window{slots: make([]slot, windowItems), news: make(chan struct{}, 1), over: make(chan struct{})}
	w.room.L, w.work.L = &w.mu, &w.mu
	return w
}

func (w *window) slot(at int) *slot { return &w.slots[at%len(w.slots)] }

// tell wakes the reader.
func (w *window) tell() {
	select {
	case w.news <- struct{}{}:
	default:
	}
}

// add copies an item into the window, when there is room. It reports whether
// the batch goes on.
func (w *window) add(item []byte) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.err == nil && (w.tail-w.head == len(w.slots) || w.tail > w.head && w.bytes+len(item) > windowBytes) {
		w.full = true
		w.room.Wait()
	}
	if w.err != nil {
		return false
	}
	s := w.slot(w.tail)
	s.payload = append(s.payload[:0], item...)
	w.bytes += len(item)
	w.tail++
	if w.idle > 0 {
		w.work.Signal()
	}
	return true
}

// freed wakes the feeder when it is worth it.
func (w *window) freed() {
	if w.full && (w.tail-w.head <= len(w.slots)/2 && w.bytes <= windowBytes/2) {
		w.full = false
		w.room.Signal()
	}
}

// finishInput says that no more items will come.
func (w *window) finishInput() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = true
	w.settle()
	w.work.Broadcast()
}

// settle notices the end of the work.
func (w *window) settle() {
	if w.err == nil && w.ended && w.signed == w.tail {
		w.fail1(errDone)
	}
}

var errDone = errors.New("the batch is done")

// fail ends the batch, for the reason that is given first.
func (w *window) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fail1(err)
}

func (w *window) fail1(err error) {
	if w.err != nil {
		return
	}
	w.err = err
	close(w.over)
	w.room.Broadcast()
	w.work.Broadcast()
	w.tell()
}

// take hands out an item to sign; ok is false when there is none and none will
// come. Workers stay until all are signed, because the last ones may be given
// back.
func (w *window) take() (at int, payload []byte, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for {
		switch {
		case w.err != nil:
			return 0, nil, false
		case len(w.returned) > 0:
			at = w.returned[0]
			w.returned = w.returned[1:]
			return at, w.slot(at).payload, true
		case w.fresh < w.tail:
			at = w.fresh
			w.fresh++
			return at, w.slot(at).payload, true
		}
		w.idle++
		w.tell()
		w.work.Wait()
		w.idle--
	}
}

// giveBack returns an item that was taken and not signed.
func (w *window) giveBack(at int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.returned = append(w.returned, at)
	w.work.Signal()
}

// put stores the result of an item.
func (w *window) put(at int, r result) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.slot(at)
	s.result, s.done = r, true
	w.bytes -= len(s.payload)
	if cap(s.payload) > keepBuffer {
		s.payload = nil
	}
	w.signed++
	if w.idle > 0 {
		w.tell()
	}
	w.freed()
	w.settle()
}

const (
	mostResults = 64                   // that due returns at a time
	lookAgain   = 2 * time.Millisecond // when the reader looks by itself
)

// due appends the results that are due, in their order, to results. When there
// are no more it returns errDone, or why the batch failed.
func (w *window) due(results []result) ([]result, error) {
	for {
		w.mu.Lock()
		for w.head < w.tail && len(results) < mostResults {
			s := w.slot(w.head)
			if !s.done {
				break
			}
			results = append(results, s.result)
			s.result, s.done = result{}, false
			w.head++
		}
		w.freed()
		err := w.err
		if errors.Is(err, errDone) && w.head < w.tail {
			err = nil
		}
		w.mu.Unlock()
		if len(results) > 0 && (err == nil || errors.Is(err, errDone)) {
			return results, nil
		}
		if err != nil {
			return nil, err
		}
		timer := time.NewTimer(lookAgain)
		select {
		case <-w.news:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// progress is the number of items that are signed.
func (w *window) progress() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.signed
}
