package sessionpool_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// digestLot is a lot of so many digests, which begin with a number.
func digestLot(from, count int) *sessionpool.Lot {
	lot := &sessionpool.Lot{}
	for i := range count {
		digest := sha256.Sum256(fmt.Append(nil, from+i))
		lot.Data = append(lot.Data, digest[:]...)
		lot.Ends = append(lot.Ends, uint(len(lot.Data)))
	}
	return lot
}

// verifyLot checks each signature of a lot.
func verifyLot(t *testing.T, pub *ecdsa.PublicKey, lot *sessionpool.Lot) {
	t.Helper()
	begin := uint(0)
	for i, end := range lot.Ends {
		if sig := lot.Signatures[i*64 : (i+1)*64]; !verifies(pub, lot.Data[begin:end], sig) {
			t.Errorf("message %d of a lot of %d: the signature %x is wrong", i, len(lot.Ends), sig)
		}
		begin = end
	}
}

// signLots has a session sign what next gives, with the key of a label.
func signLots(ctx context.Context, s *sessionpool.Session, label string, size int, next func() *sessionpool.Lot, done func(*sessionpool.Lot)) error {
	return s.Do(ctx, func(m sessionpool.Module, h pkcs11.SessionHandle) error {
		key, err := findKey(m, h, label)
		if err != nil {
			return err
		}
		return m.SignLots(ctx, h, ecdsaMechanism, key, size, next, done)
	})
}

// given is a next that gives lots one after the other.
func given(lots ...*sessionpool.Lot) func() *sessionpool.Lot {
	return func() *sessionpool.Lot {
		if len(lots) == 0 {
			return nil
		}
		lot := lots[0]
		lots = lots[1:]
		return lot
	}
}

// bare has SoftHSM2 as it is, which signs lots on a thread beside the caller's;
// behind a decorator each signature is a call of its own.
func bare(c *sessionpool.Config) { c.Wrap = nil }

func TestLotsAreSignedInTheirOrder(t *testing.T) {
	for name, change := range map[string]func(*sessionpool.Config){"on a thread": bare, "call by call": func(*sessionpool.Config) {}} {
		t.Run(name, func(t *testing.T) {
			p := newHSM(t).pool(t, change)
			pub := makeKey(t, p, "key")
			s := acquire(t, p)
			defer s.Release()
			lots := []*sessionpool.Lot{digestLot(0, 1), digestLot(1, 100), digestLot(101, 1), digestLot(102, 20)}
			var order []*sessionpool.Lot
			err := signLots(context.Background(), s, "key", 64, given(lots...), func(lot *sessionpool.Lot) {
				verifyLot(t, pub, lot)
				order = append(order, lot)
			})
			if err != nil || !slices.Equal(order, lots) {
				t.Errorf("error %v, and %d lots done, want the %d in their order", err, len(order), len(lots))
			}
		})
	}
}

func TestTheNextLotIsMadeWhileOneIsSigned(t *testing.T) {
	p := newHSM(t).pool(t, bare)
	makeKey(t, p, "key")
	s := acquire(t, p)
	defer s.Release()
	asked, next := 0, given(digestLot(0, 10), digestLot(10, 10), digestLot(20, 10))
	count := func() *sessionpool.Lot { asked++; return next() }
	var at []int // how often it was asked when a lot was done
	if err := signLots(context.Background(), s, "key", 64, count, func(*sessionpool.Lot) { at = append(at, asked) }); err != nil {
		t.Fatal(err)
	}
	if want := []int{2, 3, 4}; !slices.Equal(at, want) {
		t.Errorf("next was called %v times when the lots were done, want %v", at, want)
	}
}

func TestALotThatFailsEndsTheOthersAndLeavesTheSessionUsable(t *testing.T) {
	p := newHSM(t).pool(t, bare)
	pub := makeKey(t, p, "key")
	s := acquire(t, p)
	defer s.Release()
	// A signature of P-256 does not fit into 63 bytes.
	failed := signLots(context.Background(), s, "key", 63, given(digestLot(0, 10), digestLot(10, 10)), func(*sessionpool.Lot) {
		t.Error("a lot was done whose signatures do not fit")
	})
	if !errors.Is(failed, pkcs11.Error(pkcs11.CKR_BUFFER_TOO_SMALL)) {
		t.Errorf("error %v, want CKR_BUFFER_TOO_SMALL", failed)
	}
	mustSign(t, s, pub, "key")
}

// Both are somebody else's code, which the pool cannot trust.
func TestWhatHappensInNextAndDoneStaysThere(t *testing.T) {
	p := newHSM(t).pool(t, bare) // and is closed in order when the test ends
	pub := makeKey(t, p, "key")
	s := acquire(t, p)
	defer s.Release()
	func() {
		defer func() {
			if recover() != "next" {
				t.Error("the panic of next did not come through")
			}
		}()
		lots := given(digestLot(0, 100))
		_ = signLots(context.Background(), s, "key", 64, func() *sessionpool.Lot {
			if lot := lots(); lot != nil {
				return lot
			}
			panic("next")
		}, func(*sessionpool.Lot) {})
	}()
	err := s.Do(context.Background(), func(m sessionpool.Module, h pkcs11.SessionHandle) error {
		key, err := findKey(m, h, "key")
		if err != nil {
			return err
		}
		return m.SignLots(context.Background(), h, ecdsaMechanism, key, 64, given(digestLot(0, 1)), func(*sessionpool.Lot) {
			if _, err := m.GetSessionInfo(h); !errors.Is(err, sessionpool.ErrClosed) {
				t.Errorf("the session, used in done: %v, want ErrClosed", err)
			}
		})
	})
	if err != nil {
		t.Error(err)
	}
	mustSign(t, s, pub, "key")
}

func TestClosingThePoolEndsAStreamOfLots(t *testing.T) {
	p := newHSM(t).pool(t, bare)
	makeKey(t, p, "key")
	s := acquire(t, p)
	closed := make(chan error)
	begun := false
	endless := func() *sessionpool.Lot {
		if !begun {
			begun = true
			go func() { closed <- p.Close(context.Background()) }()
		}
		return digestLot(0, 50)
	}
	if err := signLots(context.Background(), s, "key", 64, endless, func(*sessionpool.Lot) {}); err != nil {
		t.Errorf("the stream: %v", err)
	}
	s.Release()
	if err := <-closed; err != nil {
		t.Errorf("Close: %v", err)
	}
}

// The lot would take half a minute.
func TestALotEndsWithItsContext(t *testing.T) {
	p := newHSM(t).pool(t, bare)
	pub := makeKey(t, p, "key")
	s := acquire(t, p)
	defer s.Release()
	errHurry := errors.New("no time")
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	long := digestLot(0, 1)
	for len(long.Ends) < 1<<19 {
		long.Data, long.Ends = append(long.Data, long.Data[:32]...), append(long.Ends, uint(32*(len(long.Ends)+1)))
	}
	lots := given(digestLot(0, 1), long)
	err := signLots(ctx, s, "key", 64, lots, func(lot *sessionpool.Lot) {
		if lot == long {
			t.Error("the long lot was done")
		}
		cancel(errHurry) // while the long one is being signed
	})
	if !errors.Is(err, context.Canceled) || !errors.Is(err, errHurry) {
		t.Errorf("error %v, want context.Canceled and its cause", err)
	}
	mustSign(t, s, pub, "key")
}
