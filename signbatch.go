package hsmkey

import (
	"context"
	"slices"
)

// SignJWSBatch signs several JWS signing inputs, one after the other, in the
// session that the key is pinned to by [HSMJWK.In]. It returns the signatures
// one after the other, each of the same length, or an error and none; then
// [HSMJWK.SignJWS] tells which input is to blame.
//
// It is for many tokens in a row: what each signature costs beside the HSM's work
// is shared, above all where the module computes in this process, where all of
// them are one step from Go to C. The time limit is that of each PKCS#11 call.
// A key that is not pinned signs one input at a time.
func (k *HSMJWK) SignJWSBatch(ctx context.Context, algorithm Algorithm, signingInputs [][]byte) ([]byte, error) {
	if !slices.Contains(k.material.algorithms, algorithm) {
		return nil, k.notAble(algorithm)
	}
	s := schemes[algorithm]
	if w := k.settledWay(s); w != nil && len(signingInputs) > 1 {
		return k.signMany(ctx, s, w, signingInputs)
	}
	var signatures []byte
	for _, input := range signingInputs {
		signature, err := k.sign(ctx, k.newSigning(s, input))
		if err != nil {
			return nil, err
		}
		signatures = append(signatures, signature...)
	}
	return signatures, nil
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

// signMany makes the signatures in one call. As in an attempt for one, the memory
// that it gives away is never used again.
func (k *HSMJWK) signMany(ctx context.Context, s *scheme, w *way, inputs [][]byte) ([]byte, error) {
	a := &attempt{key: k.material, session: k.pinned, way: w, ends: make([]uint, len(inputs)), size: k.signatureSize(s)}
	length := len(inputs) * maxDigestInfo
	if w.input == inputMessage {
		length = 0
		for _, input := range inputs {
			length += len(input)
		}
	}
	a.data = make([]byte, 0, length)
	for i, input := range inputs {
		switch w.input {
		case inputMessage:
			a.data = append(a.data, input...)
		case inputDigestInfo:
			a.data = s.appendHash(append(a.data, s.prefix...), input)
		case inputDigest:
			start := len(a.data)
			a.data = s.appendHash(a.data, input)
			a.data = a.data[:start+len(k.truncate(s, a.data[start:]))]
		}
		a.ends[i] = uint(len(a.data))
	}
	if err := a.do(ctx); err != nil {
		return nil, err
	}
	return a.signature, nil
}
