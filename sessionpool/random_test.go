package sessionpool_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// TestRandomUseUnderRandomFaults lets hundreds of goroutines acquire, sign,
// release, hold, bypass and cancel, while calls fail, sessions are closed and
// the login is lost. HSMKEY_SOAK=10m makes it last, HSMKEY_SEED replays a round.
func TestRandomUseUnderRandomFaults(t *testing.T) {
	h := newHSM(t)
	lasting := 3 * time.Second
	if v := os.Getenv("HSMKEY_SOAK"); v != "" {
		d, err := time.ParseDuration(v)
		if err != nil {
			t.Fatalf("HSMKEY_SOAK: %v", err)
		}
		lasting = d
	}
	seed := rand.Uint64()
	if v := os.Getenv("HSMKEY_SEED"); v != "" {
		if _, err := fmt.Sscan(v, &seed); err != nil {
			t.Fatalf("HSMKEY_SEED: %v", err)
		}
	}
	setup := h.pool(t)
	pub := makeKey(t, setup, "key")
	closePool(t, setup)
	for until := time.Now().Add(lasting); time.Now().Before(until) && !t.Failed(); seed++ {
		randomRound(t, h, pub, seed)
	}
}

func randomRound(t *testing.T, h *hsm, pub *ecdsa.PublicKey, seed uint64) {
	t.Logf("replay this round with HSMKEY_SEED=%d", seed)
	h.fault.Clear()
	h.cfg.Direct = seed%2 == 1 // both ways of making calls
	p, err := sessionpool.New(h.cfg)
	if err != nil {
		t.Errorf("seed %d: %v", seed, err)
		return
	}
	// A device error in every call is beyond what retries can hide; one in
	// some, and a lost session or login at any moment, is not.
	h.fault.Random(seed, 0.02, map[string][]uint{
		"C_Sign": {
			pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_USER_NOT_LOGGED_IN,
			pkcs11.CKR_KEY_HANDLE_INVALID, pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_OPERATION_ACTIVE,
			pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_GENERAL_ERROR,
		},
		"C_OpenSession":     {pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_GENERAL_ERROR},
		"C_FindObjectsInit": {pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_USER_NOT_LOGGED_IN, pkcs11.CKR_OPERATION_ACTIVE},
		"C_GetSessionInfo":  {pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED},
		"C_CloseSession":    {pkcs11.CKR_SESSION_HANDLE_INVALID},
	})

	var signed atomic.Int64
	var workers, meddler sync.WaitGroup
	stop := make(chan struct{})
	meddle := rand.New(rand.NewPCG(seed, 1)) //nolint:gosec // to be replayed
	meddler.Go(func() {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		last := int64(0)
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			// Disasters come by the work that is done, not by the clock: on a
			// busy machine nothing would get done between two of them.
			now := signed.Load()
			if now < last+100 {
				continue
			}
			last = now
			switch meddle.IntN(8) {
			case 0:
				h.fault.LoseLogin()
			case 1:
				h.fault.CloseSessions()
			case 2, 3:
				h.fault.CloseSession()
			}
		}
	})
	for i := range 200 {
		work := rand.New(rand.NewPCG(seed, uint64(100+i))) //nolint:gosec // to be replayed
		workers.Go(func() {
			for range 4 {
				if err := randomUse(p, pub, work, &signed); err != nil {
					t.Errorf("seed %d: %v", seed, err)
				}
			}
		})
	}
	workers.Wait()
	close(stop)
	meddler.Wait()
	h.fault.Clear()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := p.Close(ctx); err != nil {
		t.Errorf("seed %d: closing: %v", seed, err)
	}
	if n := h.fault.Sessions(); n != 0 {
		t.Errorf("seed %d: %d sessions are open in the module after Close", seed, n)
	}
	if signed.Load() == 0 {
		t.Errorf("seed %d: nothing was signed", seed)
	}
}

// randomUse is one turn of a user of the pool. Nobody may see a wrong signature
// or that a session was lost; who cancels may see that.
func randomUse(p *sessionpool.Pool, pub *ecdsa.PublicKey, rng *rand.Rand, signed *atomic.Int64) error {
	var data [8]byte
	binary.BigEndian.PutUint64(data[:], rng.Uint64())
	digest := sha256.Sum256(data[:])
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	impatient := rng.IntN(10) == 0
	if impatient {
		time.AfterFunc(time.Duration(rng.IntN(2000))*time.Microsecond, cancel)
	}
	var opts []sessionpool.Option
	switch rng.IntN(10) {
	case 0:
		opts = append(opts, sessionpool.Bypass())
	case 1:
		opts = append(opts, sessionpool.ReadWrite())
	}
	times, closed := 1, rng.IntN(10) == 0
	if rng.IntN(5) == 0 {
		times = 5 // one session for several signatures
	}
	err := sessionpool.Retry(ctx, p, func(s *sessionpool.Session) error {
		if closed {
			defer s.Close()
		}
		for range times {
			sig, err := sign(ctx, s, "key", digest[:])
			if err != nil {
				return err
			}
			if !verifies(pub, digest[:], sig) {
				return errors.New("a signature is wrong")
			}
			signed.Add(1)
		}
		return nil
	}, opts...)
	if impatient && errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}
