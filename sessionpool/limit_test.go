package sessionpool_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

func TestAtTheLimitCallersWaitTheirTurn(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.MaxSessions = 2 })
	a, b := acquire(t, p), acquire(t, p)
	ctx, cancel := context.WithCancel(context.Background())
	failed := make(chan error, 1)
	go func() {
		_, err := p.Acquire(ctx)
		failed <- err
	}()
	until(t, "somebody waits", func() bool { return p.Stats().Waiting == 1 })
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) || errors.Is(err, sessionpool.ErrTimeout) {
		t.Errorf("a cancelled wait: %v, want context.Canceled", err)
	}
	ctx, cancel = context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	if _, err := p.Acquire(ctx); !errors.Is(err, sessionpool.ErrTimeout) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a wait that is too long: %v, want ErrTimeout and context.DeadlineExceeded", err)
	}
	got := make(chan *sessionpool.Session, 1)
	go func() { got <- acquire(t, p) }()
	until(t, "somebody waits", func() bool { return p.Stats().Waiting == 1 })
	want := handle(t, a)
	a.Release()
	s := <-got
	if handle(t, s) != want {
		t.Error("the waiter did not get the session that was released")
	}
	s.Release()
	b.Release()
}

func TestAtTheLimitAnIdleSessionMakesRoomForAnotherKind(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.MaxSessions = 1 })
	ro := acquire(t, p)
	ro.Release()
	rw := acquire(t, p, sessionpool.ReadWrite())
	got := make(chan *sessionpool.Session, 1)
	go func() { got <- acquire(t, p) }()
	until(t, "somebody waits", func() bool { return p.Stats().Waiting == 1 })
	rw.Release()
	s := <-got
	defer s.Release()
	if st := p.Stats(); st.ClosedLimit != 2 || st.Open != 1 {
		t.Errorf("stats %+v, want 2 closed to make room and 1 open", st)
	}
}

func TestWhoHearsThatASessionIsClosedFindsItsPlaceFree(t *testing.T) {
	h := newHSM(t)
	var p *sessionpool.Pool
	heard := make(chan error, 1)
	p = h.pool(t, func(c *sessionpool.Config) {
		c.MaxSessions = 1
		c.OnEvent = func(e sessionpool.Event) {
			if e.Kind == sessionpool.SessionClosed && len(heard) == 0 {
				s, err := p.Acquire(context.Background(), sessionpool.NoWait())
				heard <- err
				if err == nil {
					s.Release()
				}
			}
		}
	})
	acquire(t, p).Close()
	if err := <-heard; err != nil {
		t.Errorf("acquiring where a session was closed: %v", err)
	}
}

func TestASmallerLimitOfAnotherPoolIsKept(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	idle, used := acquire(t, p), []*sessionpool.Session{acquire(t, p), acquire(t, p)}
	idle.Release()
	h.pool(t, func(c *sessionpool.Config) { c.MaxSessions = 1 })
	h.events.wait(t, 2, closedBy(sessionpool.CloseLimit)) // both pools are told
	for _, s := range used {
		if err := ping(s); err != nil {
			t.Errorf("a session in use: %v", err)
		}
		s.Release()
	}
	if st := p.Stats(); st.Open != 1 || st.Idle != 1 || st.Limit != 1 {
		t.Errorf("stats %+v, want one session left", st)
	}
}

func TestTheTokensOwnLimitLowersOurs(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.MaxSessions = 8 })
	a, b := acquire(t, p), acquire(t, p)
	h.fault.FailAll("C_OpenSession", pkcs11.CKR_SESSION_COUNT)
	got := make(chan *sessionpool.Session, 1)
	go func() { got <- acquire(t, p) }()
	h.events.wait(t, 1, ofKind(sessionpool.LimitLowered))
	if st := p.Stats(); st.Limit != 2 {
		t.Errorf("the limit is %d, want 2", st.Limit)
	}
	a.Release()
	s := <-got
	if err := ping(s); err != nil {
		t.Error(err)
	}
	s.Release()
	b.Release()
}

func TestATokenThatBearsOneSessionNeedsNoAnchor(t *testing.T) {
	h := newHSM(t)
	// The first session is open, every further one is refused.
	one := func(m sessionpool.Module) sessionpool.Module { return &oneSession{Module: h.fault.Wrap(m)} }
	p := h.pool(t, func(c *sessionpool.Config) { c.Wrap = one })
	pub := makeKey(t, p, "key")
	for range 3 {
		s := acquire(t, p)
		mustSign(t, s, pub, "key")
		s.Release()
	}
	if st := p.Stats(); st.Open != 1 {
		t.Errorf("stats %+v, want 1 open", st)
	}
}

func TestTheLoginOfATokenThatBearsOneSessionEndsWithIt(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) {
		c.Wrap = func(m sessionpool.Module) sessionpool.Module { return h.fault.Wrap(&oneSession{Module: m}) }
	})
	pub := makeKey(t, p, "key") // which closes its session
	if p.Stats().LoggedIn {
		t.Error("the pool takes itself for logged in")
	}
	s := acquire(t, p)
	mustSign(t, s, pub, "key")
	s.Release()
	s = acquire(t, p, sessionpool.ReadWrite()) // in place of the other
	defer s.Release()
	mustSign(t, s, pub, "key")
	if n, _ := h.events.count(ofKind(sessionpool.LoginLost)); n != 0 {
		t.Errorf("somebody is said to have logged the user out, %d times", n)
	}
}

func TestALoginThatFailsWithItsOnlySessionRenewsIt(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) {
		c.Wrap = func(m sessionpool.Module) sessionpool.Module { return h.fault.Wrap(&oneSession{Module: m}) }
	})
	pub := makeKey(t, p, "key")
	s := acquire(t, p)
	mustSign(t, s, pub, "key")
	h.fault.LoseLogin()
	h.fault.Fail("C_Login", 1, pkcs11.CKR_SESSION_HANDLE_INVALID)
	mustSign(t, s, pub, "key")
	s.Release()
	s = acquire(t, p)
	defer s.Release()
	mustSign(t, s, pub, "key")
}

func TestAOneTimePINIsEnoughWhereATokenBearsOneSession(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) {
		c.Wrap = func(m sessionpool.Module) sessionpool.Module { return &oneSession{Module: h.fault.Wrap(m)} }
	})
	s := acquire(t, p, sessionpool.OneTimePIN(testhsm.PIN))
	defer s.Release()
	if n := h.fault.Calls("C_Login"); n != 1 {
		t.Errorf("C_Login was called %d times, want once", n)
	}
}

// oneSession is a token that refuses a second session.
type oneSession struct {
	sessionpool.Module
	mu   sync.Mutex
	open int
}

func (m *oneSession) OpenSession(slot, flags uint) (pkcs11.SessionHandle, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.open == 1 {
		return 0, pkcs11.Error(pkcs11.CKR_SESSION_COUNT)
	}
	h, err := m.Module.OpenSession(slot, flags)
	if err == nil {
		m.open++
	}
	return h, err
}

func (m *oneSession) CloseSession(h pkcs11.SessionHandle) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	err := m.Module.CloseSession(h)
	if err == nil {
		m.open--
	}
	return err
}
