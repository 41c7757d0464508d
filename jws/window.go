package jws

import (
	"errors"
	"sync"
	"time"
)

// The window of a batch. It is larger than what any number of sessions signs at
// a time, so that one slow item does not hold up the others.
const (
	windowItems = 8 * MaxBatchSessions
	windowBytes = 4 << 20 // of payloads, unless a single one is larger
	keepBuffer  = 1 << 10 // of a slot
)

// window is the part of a batch that is in memory: items before head were
// delivered, those before fresh are signed or being signed, those before tail
// wait. All positions count items of the whole batch.
//
// Waking somebody costs as much as a good part of a signature, so the feeder and
// the reader are not woken for each item: the feeder when half of the window is
// free, the reader when a worker runs out of work, when half of the window is
// results, and else after a while.
type window struct {
	mu   sync.Mutex
	room sync.Cond     // the feeder waits for it
	work sync.Cond     // workers wait for it
	news chan struct{} // the reader waits for it

	slots             []slot // a ring
	head, fresh, tail int
	returned          []int     // to be signed again
	bytes             int       // of payloads in the window
	signed            int       // results so far
	idle              int       // workers that wait
	told              time.Time // when the reader was woken last
	telling           bool      // it will be
	full              bool      // the feeder waits
	ended             bool      // the input has
	err               error     // why the batch is over
	over              chan struct{}
}

// slot is one item. Its payload is written by the feeder before the item is
// taken, and read by the one worker that took it.
type slot struct {
	payload []byte
	size    int // of the payload, counted until the item is delivered
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
	w.told = time.Now()
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
	s.payload, s.size = append(s.payload[:0], item...), len(item)
	w.bytes += s.size
	w.tail++
	if w.idle > 0 {
		w.work.Signal()
	}
	return true
}

// finishInput says that no more items will come.
func (w *window) finishInput() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = true
	w.settle()
}

// settle notices the end of the work.
func (w *window) settle() {
	if w.err == nil && w.ended && w.signed == w.tail {
		w.end(errDone)
	}
}

var errDone = errors.New("the batch is done")

// fail ends the batch, for the reason that is given first.
func (w *window) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.end(err)
	}
}

func (w *window) end(err error) {
	w.err = err
	close(w.over)
	w.room.Broadcast()
	w.work.Broadcast()
	w.tell()
}

// take appends at most so many items to lot, and only this worker's share of
// what there is; none when none will come, or, without waiting, when there are
// none. Workers wait until all items are signed, because others may give theirs
// back.
func (w *window) take(lot []item, most, workers int, wait bool) []item {
	w.mu.Lock()
	defer w.mu.Unlock()
	for wait && w.err == nil && len(w.returned) == 0 && w.fresh == w.tail {
		w.idle++
		w.tell()
		w.work.Wait()
		w.idle--
	}
	if w.err != nil {
		return lot
	}
	most = min(most, (w.tail-w.fresh+len(w.returned)+workers-1)/workers)
	for bytes := 0; len(lot) < most && bytes < lotBytes; {
		var at int
		switch {
		case len(w.returned) > 0:
			at, w.returned = w.returned[0], w.returned[1:]
		case w.fresh < w.tail:
			at = w.fresh
			w.fresh++
		}
		s := w.slot(at)
		bytes += len(s.payload)
		lot = append(lot, item{at: at, payload: s.payload})
	}
	return lot
}

// put stores the results of the items that are done. The others are for somebody
// else.
func (w *window) put(lot []item) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range lot {
		it := &lot[i]
		if !it.done {
			w.returned = append(w.returned, it.at)
			w.work.Signal()
			continue
		}
		s := w.slot(it.at)
		s.result, s.done = it.result, true
		if cap(s.payload) > keepBuffer {
			s.payload = nil
		}
		w.signed++
	}
	if w.slot(w.head).done {
		w.announce()
	}
	w.settle()
}

// announce has the reader woken, who has something to read: now, or soon.
func (w *window) announce() {
	switch {
	case w.idle > 0 || w.signed-w.head >= windowItems/2 || time.Since(w.told) >= mostDelay:
		w.tell()
	case !w.telling:
		w.telling = true
		time.AfterFunc(mostDelay, func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.telling = false
			w.tell()
		})
	}
}

const (
	mostResults = 64                    // that due returns at a time
	mostDelay   = 10 * time.Millisecond // until the reader is told of them
)

// due appends the results that are due, in their order, to results. When there
// are no more it returns errDone, or why the batch failed.
func (w *window) due(results []result) ([]result, error) {
	for {
		results, err := w.dueNow(results)
		if len(results) > 0 || err != nil {
			return results, err
		}
		<-w.news
	}
}

func (w *window) dueNow(results []result) ([]result, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil && !errors.Is(w.err, errDone) {
		return nil, w.err
	}
	for w.head < w.tail && len(results) < mostResults {
		s := w.slot(w.head)
		if !s.done {
			break
		}
		results = append(results, s.result)
		s.result, s.done = result{}, false
		w.bytes -= s.size
		w.head++
	}
	if w.full && w.tail-w.head <= len(w.slots)/2 && w.bytes <= windowBytes/2 {
		w.full = false
		w.room.Signal()
	}
	if len(results) == 0 {
		return nil, w.err
	}
	return results, nil
}

// progress is the number of items that are signed.
func (w *window) progress() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.signed
}
