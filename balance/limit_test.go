package balance_test

import (
	"context"
	"errors"
	"maps"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/balance"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// An HSM that bears three sessions is used with those: they are busy, not dead.
func TestAnHSMThatBearsFewSessionsGoesOnWithThose(t *testing.T) {
	_, content := serve(t, 0, 0)
	s := remote(list(t, content))
	limit := &sessionLimit{most: 3}
	s.Pool.Wrap = func(m sessionpool.Module) sessionpool.Module {
		return &limited{Module: m, limit: limit, open: map[pkcs11.SessionHandle]bool{}}
	}
	b := s.open(t)
	key := find(t, b, "key")
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for range 50 {
				if err := sign(context.Background(), key, &shared.key.PublicKey, []byte("a.b")); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
	if limit.refused.Load() == 0 {
		t.Error("the limit was never reached")
	}
	e := b.Stats().Lists[0].Endpoints[0]
	if e.State != balance.Up || e.Failures != 0 || !errors.Is(e.LastError, pkcs11.Error(pkcs11.CKR_SESSION_COUNT)) {
		t.Errorf("stats %+v, want it up, and CKR_SESSION_COUNT as what it said last", e)
	}
}

// sessionLimit is what an HSM bears on all its connections together.
type sessionLimit struct {
	most    int64
	open    atomic.Int64
	refused atomic.Int64
}

type limited struct {
	sessionpool.Module
	limit *sessionLimit
	mu    sync.Mutex
	open  map[pkcs11.SessionHandle]bool
}

func (l *limited) OpenSession(slot, flags uint) (pkcs11.SessionHandle, error) {
	if l.limit.open.Add(1) > l.limit.most {
		l.limit.open.Add(-1)
		l.limit.refused.Add(1)
		return 0, pkcs11.Error(pkcs11.CKR_SESSION_COUNT)
	}
	h, err := l.Module.OpenSession(slot, flags)
	if err != nil {
		l.limit.open.Add(-1)
		return h, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open[h] = true
	return h, nil
}

func (l *limited) CloseSession(h pkcs11.SessionHandle) error {
	err := l.Module.CloseSession(h)
	l.forget(func(other pkcs11.SessionHandle, _ bool) bool { return other == h })
	return err
}

func (l *limited) Finalize() error {
	l.forget(func(pkcs11.SessionHandle, bool) bool { return true })
	return l.Module.Finalize()
}

func (l *limited) forget(which func(pkcs11.SessionHandle, bool) bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	before := len(l.open)
	maps.DeleteFunc(l.open, which)
	l.limit.open.Add(int64(len(l.open) - before))
}
