package balance_test

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/balance"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// oddHSM is an HSM with another key under the label that all have, or without.
func oddHSM(tb testing.TB, key *ecdsa.PrivateKey) *testhsm.HSM {
	tb.Helper()
	h := emptyHSM(tb, filepath.Join(tb.TempDir(), "odd"), "odd")
	if key != nil {
		testhsm.Import(tb, h, key, "key", "01")
	}
	return h
}

// signers signs from several goroutines, n times each, and returns by how many of
// the signatures verify.
func signers(tb testing.TB, key *hsmkey.HSMJWK, public *ecdsa.PublicKey, n int) {
	tb.Helper()
	var group sync.WaitGroup
	for g := range 4 {
		group.Go(func() {
			for i := range n {
				if err := sign(context.Background(), key, public, fmt.Appendf(nil, "%d.%d", g, i)); err != nil {
					tb.Errorf("signature %d: %v", i, err)
					return
				}
			}
		})
	}
	group.Wait()
}

func TestAnotherKeyUnderTheSameLabelIsNeverUsedAndReported(t *testing.T) {
	odd := testhsm.Remote(t, oddHSM(t, newKey(t)), "127.0.0.9:0")
	servers, _ := serve(t, 0, 1)
	for position := range 3 {
		t.Run(fmt.Sprintf("at position %d", position), func(t *testing.T) {
			content := ""
			for i := range 3 {
				if i == position {
					content += address(odd)
				} else {
					content += address(servers[len(strings.Split(strings.ReplaceAll(content, address(odd), ""), "\n"))-1])
				}
			}
			s := remote(list(t, content))
			b := s.open(t)
			key := find(t, b, "key")
			if !shared.key.PublicKey.Equal(key.Public()) {
				t.Fatal("the key of one HSM outweighs that of two")
			}
			signers(t, key, &shared.key.PublicKey, 30)
			e := s.events.wait(t, balance.LeftOut, 1)
			if e.Endpoint != odd.Address || !errors.Is(e.Err, hsmkey.ErrKeyMismatch) || !strings.Contains(e.Err.Error(), odd.Address) {
				t.Errorf("event %+v, want ErrKeyMismatch of %s", e, odd.Address)
			}
			if e := stats(t, b, odd.Address); e.State != balance.Up || e.LeftOut == 0 || e.Failures != 0 {
				t.Errorf("stats %+v, want it up, and left out", e)
			}
		})
	}
	// Of equals the first has the say.
	s := remote(list(t, address(servers[1])+address(odd)))
	key := find(t, s.open(t), "key")
	signers(t, key, &shared.key.PublicKey, 10)
	// Where nobody else is left, nobody signs.
	servers[1].Kill()
	if _, err := key.SignJWS(context.Background(), hsmkey.ES256, []byte("a.b")); !errors.Is(err, hsmkey.ErrSession) {
		t.Errorf("the odd HSM and a dead one: %v, want ErrSession", err)
	}
}

func TestAnEndpointWithoutTheKeyIsLeftOut(t *testing.T) {
	without := testhsm.Remote(t, oddHSM(t, nil), "127.0.0.9:0")
	servers, content := serve(t, 0, 0)
	s := remote(list(t, address(without)+content))
	b := s.open(t)
	key := find(t, b, "key")
	signers(t, key, &shared.key.PublicKey, 20)
	if e := s.events.wait(t, balance.LeftOut, 1); e.Endpoint != without.Address || !errors.Is(e.Err, hsmkey.ErrKeyNotFound) {
		t.Errorf("event %+v, want ErrKeyNotFound of %s", e, without.Address)
	}
	// An HSM that is down is no HSM without the key.
	servers[0].Kill()
	if _, err := key.SignJWS(context.Background(), hsmkey.ES256, []byte("a.b")); !errors.Is(err, hsmkey.ErrSession) || errors.Is(err, hsmkey.ErrKeyNotFound) {
		t.Errorf("the only HSM with the key is down: %v, want ErrSession and not ErrKeyNotFound", err)
	}
	if _, err := hsmkey.FromHSM(context.Background(), b, hsmkey.Query{Label: "key"}); !errors.Is(err, hsmkey.ErrSession) || errors.Is(err, hsmkey.ErrKeyNotFound) {
		t.Errorf("finding it: %v, want ErrSession and not ErrKeyNotFound", err)
	}
	servers[0].Restart()
	if _, err := hsmkey.FromHSM(context.Background(), b, hsmkey.Query{Label: "nobody has it"}); !errors.Is(err, hsmkey.ErrKeyNotFound) || errors.Is(err, hsmkey.ErrSession) {
		t.Errorf("a key that nobody has: %v, want ErrKeyNotFound and not ErrSession", err)
	}
}

// A one-time PIN is good for one login: it is not sent to the next HSM when the
// first one refuses it, which says nothing about the HSM.
func TestAOneTimePINIsSentToOneHSM(t *testing.T) {
	hsm(t, 2)
	s := private(t, list(t, lines(0, 2)))
	logins := &loginCounter{}
	wrap := s.Pool.Wrap
	s.Pool.Wrap = func(m sessionpool.Module) sessionpool.Module { return logins.wrap(wrap(m)) }
	b := s.open(t)
	turns(t, b, 3)
	before := logins.n.Load()
	_, err := b.Acquire(context.Background(), sessionpool.OneTimePIN("123456"))
	if !errors.Is(err, sessionpool.ErrPIN) {
		t.Errorf("a wrong one-time PIN: %v, want ErrPIN", err)
	}
	if n := logins.n.Load() - before; n != 1 {
		t.Errorf("it was sent %d times", n)
	}
	if got := len(b.Stats().Lists); got != 1 {
		t.Fatal(got)
	}
	for _, e := range b.Stats().Lists[0].Endpoints {
		if e.State != balance.Up || e.Failures != 0 {
			t.Errorf("a person's mistake counts as the HSM's: %+v", e)
		}
	}
	one := acquire(t, b, sessionpool.OneTimePIN(testhsm.PIN))
	if err := ping(one); err != nil {
		t.Error(err)
	}
	one.Release()
}
