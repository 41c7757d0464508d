package hsmkey_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/fault"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// acquire takes a session that is given back when the test ends.
func acquire(t *testing.T, h *hsmkey.HSM) *sessionpool.Session {
	t.Helper()
	s, err := h.Source().Acquire(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Release)
	return s
}

// signLots signs the inputs as several lots, of which the first is one input, the
// second two, and so on. It returns all signatures that were handed out.
func signLots(key *hsmkey.HSMJWK, algorithm hsmkey.Algorithm, inputs [][]byte) (signatures []byte, err error) {
	size := 0
	next := func() [][]byte {
		size++
		lot := inputs[:min(size, len(inputs))]
		inputs = inputs[len(lot):]
		return lot
	}
	err = key.SignJWSBatch(context.Background(), algorithm, next, func(s []byte) { signatures = append(signatures, s...) })
	return signatures, err
}

// signBatch signs messages of many lengths at once in one session and verifies
// each signature.
func signBatch(t *testing.T, h *hsmkey.HSM, key *hsmkey.HSMJWK, algorithm hsmkey.Algorithm) {
	t.Helper()
	s := acquire(t, h)
	var inputs [][]byte
	for i := range 20 {
		inputs = append(inputs, []byte(strings.Repeat("m", i*i)+fmt.Sprint(i)))
	}
	for _, count := range []int{1, len(inputs), 2} {
		signatures, err := signLots(key.In(s), algorithm, inputs[:count])
		if err != nil {
			t.Errorf("%s, %d inputs: %v", algorithm, count, err)
			return
		}
		size := len(signatures) / count
		for i := range count {
			if err := verify(key, algorithm, inputs[i], signatures[i*size:(i+1)*size]); err != nil {
				t.Errorf("%s, %d of %d inputs: %v", algorithm, i, count, err)
			}
		}
	}
}

// SoftHSM2 as it is makes all signatures of a batch on a thread; behind a
// decorator each has one of its own.
func TestABatchOfInputsIsSignedByEveryAlgorithm(t *testing.T) {
	plain := func(m sessionpool.Module) sessionpool.Module { return m }
	for name, wrap := range map[string]func(sessionpool.Module) sessionpool.Module{"on a thread": nil, "call by call": plain} {
		t.Run(name, func(t *testing.T) {
			h := wrapped(t, wrap)
			for _, typ := range []hsmkey.KeyType{hsmkey.RSA2048, hsmkey.P256, hsmkey.P521, hsmkey.Ed25519, hsmkey.HMAC512} {
				key := generate(t, h, string(typ), typ)
				for _, algorithm := range key.Algorithms() {
					signBatch(t, h, key, algorithm)
				}
			}
		})
	}
}

func TestABatchOfInputsIsSignedByModulesThatHashThemselves(t *testing.T) {
	h := wrapped(t, func(m sessionpool.Module) sessionpool.Module { return hashing{odd{m}} })
	signBatch(t, h, generate(t, h, "key", hsmkey.P256), hsmkey.ES256)
}

func TestALotOfInputsFailsAsAWhole(t *testing.T) {
	for name, direct := range map[string]bool{"directly": true, "on the session's goroutine": false} {
		t.Run(name, func(t *testing.T) {
			injector := fault.New()
			c := config(testhsm.New(t))
			c.Pool.Wrap, c.Pool.Direct = injector.Wrap, direct
			h := open(t, c)
			key := generate(t, h, "key", hsmkey.P256)
			s := acquire(t, h)
			pinned := key.In(s)
			inputs := slices.Repeat([][]byte{[]byte("a.b")}, 6) // in lots of 1, 2 and 3
			if _, err := signLots(pinned, hsmkey.ES256, inputs); err != nil {
				t.Fatal(err)
			}
			before := injector.Calls("C_Sign")
			injector.Fail("C_Sign", 3, pkcs11.CKR_DATA_LEN_RANGE)
			signatures, err := signLots(pinned, hsmkey.ES256, inputs)
			if len(signatures) != 64 || !errors.Is(err, pkcs11.Error(pkcs11.CKR_DATA_LEN_RANGE)) || errors.Is(err, hsmkey.ErrSession) {
				t.Errorf("signatures %x and error %v, want the first lot and the error of the second one", signatures, err)
			}
			if n := injector.Calls("C_Sign") - before; n != 3 {
				t.Errorf("C_Sign was called %d times, want 3", n)
			}
			injector.Fail("C_Sign", 2, pkcs11.CKR_DEVICE_ERROR)
			if _, err := signLots(pinned, hsmkey.ES256, inputs); !errors.Is(err, hsmkey.ErrSession) {
				t.Errorf("in a session that fails: %v, want ErrSession", err)
			}
			if _, err := signLots(pinned, hsmkey.RS256, inputs); !errors.Is(err, hsmkey.ErrUnsupported) {
				t.Errorf("by another algorithm: %v, want ErrUnsupported", err)
			}
		})
	}
}

// Modules take no address of nothing.
func TestEmptyInputsAreSignedInALot(t *testing.T) {
	plain := func(m sessionpool.Module) sessionpool.Module { return m }
	for name, wrap := range map[string]func(sessionpool.Module) sessionpool.Module{"on a thread": nil, "call by call": plain} {
		t.Run(name, func(t *testing.T) {
			h := wrapped(t, wrap)
			key := generate(t, h, "key", hsmkey.Ed25519)
			s := acquire(t, h)
			signatures, err := signLots(key.In(s), hsmkey.EdDSA, make([][]byte, 6))
			if err != nil || len(signatures) != 6*64 {
				t.Fatalf("%d bytes of signatures and error %v, want six signatures", len(signatures), err)
			}
			if err := verify(key, hsmkey.EdDSA, nil, signatures[5*64:]); err != nil {
				t.Error(err)
			}
		})
	}
}

// The race detector sees whether the call that comes back late still writes to
// what its caller has.
func TestALotThatComesBackLateIsNobodysAffair(t *testing.T) {
	injector := fault.New()
	c := config(testhsm.New(t))
	c.Pool.Wrap, c.Pool.OpTimeout = injector.Wrap, 100*time.Millisecond
	h := open(t, c)
	key := generate(t, h, "key", hsmkey.P256)
	s := acquire(t, h)
	if _, err := signLots(key.In(s), hsmkey.ES256, make([][]byte, 1)); err != nil {
		t.Fatal(err)
	}
	_, release := injector.Hang("C_Sign")
	if signatures, err := signLots(key.In(s), hsmkey.ES256, make([][]byte, 1)); !errors.Is(err, hsmkey.ErrTimeout) || signatures != nil {
		t.Errorf("signatures %x and error %v, want ErrTimeout", signatures, err)
	}
	release()
}
