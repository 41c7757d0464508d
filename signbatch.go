package hsmkey

import (
	"context"
	"slices"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// SignJWSBatch signs lot after lot of JWS signing inputs in the session that the
// key is pinned to by [HSMJWK.In], until next returns none. It hands the signatures
// of each lot to done, in their order: one after the other, each of the same
// length, valid until done returns. Both run on the caller's goroutine, and must
// not use the session.
//
// It is for many tokens in a row: what each signature costs beside the HSM's work
// is shared. Where the module computes in this process, one lot is signed while the
// next one is made: next may have been asked for two lots that done has not seen
// yet, and is asked again as long as lots are out, even if it had none before. With
// other HSMs the time limit is that of each PKCS#11 call. A key that is not pinned
// signs one input at a time.
//
// When there is an error, no input of the lots that done has not seen counts as
// signed; [HSMJWK.SignJWS] tells which one is to blame.
func (k *HSMJWK) SignJWSBatch(ctx context.Context, algorithm Algorithm, next func() [][]byte, done func(signatures []byte)) error {
	if !slices.Contains(k.material.algorithms, algorithm) {
		return k.notAble(algorithm)
	}
	s := schemes[algorithm]
	for inputs := next(); len(inputs) > 0; {
		w := k.settledWay(s)
		if w != nil && k.pinned.Direct() {
			over, err := k.signLots(ctx, s, w, inputs, next, done)
			if over || err != nil {
				return err
			}
		} else {
			signatures, err := k.signLot(ctx, s, w, inputs)
			if err != nil {
				return err
			}
			done(signatures)
		}
		inputs = next()
	}
	return nil
}

// settledWay returns how the HSM of the pinned session signs by a scheme, if that
// is known and needs no login for each signature.
func (k *HSMJWK) settledWay(s *scheme) *way {
	if k.pinned == nil || k.material.always.Load() {
		return nil
	}
	if i := k.material.recall(choice{k.pinned.Token(), s.id}); i >= 0 {
		return &s.ways[i]
	}
	return nil
}

// signLot signs a lot by itself, one by one if no way is known.
func (k *HSMJWK) signLot(ctx context.Context, s *scheme, w *way, inputs [][]byte) (signatures []byte, err error) {
	if w == nil {
		for _, input := range inputs {
			signature, err := k.sign(ctx, k.newSigning(s, input))
			if err != nil {
				return nil, err
			}
			signatures = append(signatures, signature...)
		}
		return signatures, nil
	}
	// A call that was left may come back later and write to its own memory.
	var signed []byte
	none := func() [][]byte { return nil }
	if _, err := k.signLots(ctx, s, w, inputs, none, func(s []byte) { signed = s }); err != nil {
		return nil, err
	}
	return signed, nil
}

// signLots signs lots that follow each other, of which the first one is there. over
// says that next had no more; else the session has something else to do in between.
func (k *HSMJWK) signLots(ctx context.Context, s *scheme, w *way, first [][]byte, next func() [][]byte, done func([]byte)) (over bool, err error) {
	l := &stream{
		ctx: ctx, inputs: next, done: done,
		fill: func(lot *sessionpool.Lot, inputs [][]byte) { k.fill(lot, s, w, inputs) },
	}
	l.add(first)
	a := &attempt{key: k.material, session: k.pinned, way: w, lots: l, size: k.signatureSize(s)}
	if err := a.do(ctx); err != nil {
		return false, err
	}
	return l.over, nil
}

// fill writes what is signed of the inputs to a lot.
func (k *HSMJWK) fill(lot *sessionpool.Lot, s *scheme, w *way, inputs [][]byte) {
	lot.Data, lot.Ends = slices.Grow(lot.Data[:0], 1), lot.Ends[:0] // not nil: modules refuse NULL
	for _, input := range inputs {
		switch w.input {
		case inputMessage:
			lot.Data = append(lot.Data, input...)
		case inputDigestInfo:
			lot.Data = s.appendHash(append(lot.Data, s.prefix...), input)
		case inputDigest:
			start := len(lot.Data)
			lot.Data = s.appendHash(lot.Data, input)
			lot.Data = lot.Data[:start+len(k.truncate(s, lot.Data[start:]))]
		}
		lot.Ends = append(lot.Ends, uint(len(lot.Data)))
	}
}

// stream is what an attempt at several lots has before it.
type stream struct {
	ctx     context.Context
	inputs  func() [][]byte                  // of the next lot
	fill    func(*sessionpool.Lot, [][]byte) // makes a lot of them
	done    func(signatures []byte)          // takes what became of one
	pending []*sessionpool.Lot               // that are not signed
	given   int                              // of them, in this run: one that is made again begins anew
	spare   []*sessionpool.Lot               // that were signed
	over    bool                             // there were no inputs when they were asked for last
}

func (l *stream) next() *sessionpool.Lot {
	if l.given == len(l.pending) {
		inputs := l.inputs()
		if l.over = len(inputs) == 0; l.over {
			return nil
		}
		l.add(inputs)
	}
	l.given++
	return l.pending[l.given-1]
}

func (l *stream) add(inputs [][]byte) {
	lot := new(sessionpool.Lot)
	if n := len(l.spare); n > 0 {
		lot, l.spare = l.spare[n-1], l.spare[:n-1]
	}
	l.fill(lot, inputs)
	l.pending = append(l.pending, lot)
}

func (l *stream) signed(lot *sessionpool.Lot) {
	l.pending = l.pending[1:]
	l.given--
	l.done(lot.Signatures)
	l.spare = append(l.spare, lot)
}
