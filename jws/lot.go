package jws

import "encoding/base64"

// lot is the items that a worker takes at a time.
type lot struct {
	items  []item
	buffer []byte   // what is signed of them
	inputs [][]byte // the same item by item
	places []int    // in items, of the inputs
	token  []byte
}

// item is one item of a lot.
type item struct {
	at      int
	payload []byte // valid while the worker has the item
	done    bool
	result
}

const (
	mostLot  = 2048
	lotBytes = 256 << 10 // of payloads, unless a single one is larger
)

// prepare writes what is signed of each item. An item that cannot be prepared is
// done.
func (l *lot) prepare(b *batch) {
	for i := range l.items {
		it := &l.items[i]
		payload := it.payload
		if b.opts.Prepare != nil {
			if payload, it.err = b.opts.Prepare(it.at, payload); it.err != nil {
				it.done = true
				continue
			}
		}
		begin := len(l.buffer)
		l.buffer = append(l.buffer, b.signer.prefix...)
		l.buffer = base64.RawURLEncoding.AppendEncode(l.buffer, payload)
		l.inputs = append(l.inputs, l.buffer[begin:])
		l.places = append(l.places, i)
	}
	// The buffer may have moved while it grew.
	begin := 0
	for i, input := range l.inputs {
		end := begin + len(input)
		l.inputs[i] = l.buffer[begin:end:end]
		begin = end
	}
}

// finish makes the token of an input.
func (l *lot) finish(i int, signature []byte) {
	l.token = append(append(l.token[:0], l.inputs[i]...), '.')
	l.token = base64.RawURLEncoding.AppendEncode(l.token, signature)
	it := &l.items[l.places[i]]
	it.token, it.done = string(l.token), true
}

// finishAll makes the tokens of all inputs. The signatures lie one after the other.
func (l *lot) finishAll(signatures []byte) {
	size := len(signatures) / len(l.inputs)
	for i := range l.inputs {
		l.finish(i, signatures[i*size:(i+1)*size])
	}
}

// fail says that an input cannot be signed.
func (l *lot) fail(i int, err error) {
	it := &l.items[l.places[i]]
	it.err, it.done = err, true
}

// clear keeps nothing of the items.
func (l *lot) clear() {
	clear(l.items)
	clear(l.inputs)
	l.items, l.inputs, l.places = l.items[:0], l.inputs[:0], l.places[:0]
	if cap(l.buffer) > 2*lotBytes { // an item was very large
		l.buffer, l.token = nil, nil
	}
	l.buffer = l.buffer[:0]
}
