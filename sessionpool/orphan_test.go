package sessionpool_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/sessionpool"
)

func TestASessionWhoseCloseTimedOutIsClosedOnce(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.OpTimeout = 200 * time.Millisecond })
	s := acquire(t, p)
	reached, release := h.fault.Hang("C_CloseSession")
	defer release()
	s.Close()
	<-reached
	release()
	h.events.wait(t, 1, ofKind(sessionpool.OrphanReturned))
	if n := h.fault.Calls("C_CloseSession"); n != 1 {
		t.Errorf("C_CloseSession was called %d times, want once: the handle may be another session's by then", n)
	}
}

func TestAnOrphanThatSomebodyClosedIsNotClosedAgain(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.OpTimeout = 200 * time.Millisecond })
	s := acquire(t, p)
	_, release := h.fault.Hang("C_GetSessionInfo")
	defer release()
	if err := ping(s); !errors.Is(err, sessionpool.ErrTimeout) {
		t.Fatalf("got %v, want ErrTimeout", err)
	}
	s.Release()
	h.fault.CloseSession()
	release()
	h.events.wait(t, 1, ofKind(sessionpool.OrphanReturned))
	if n := h.fault.Calls("C_CloseSession"); n != 0 {
		t.Errorf("C_CloseSession was called %d times, want never: the handle may be another session's by then", n)
	}
}

func TestThoseWhoWaitedAreHeldToTheCapOfOrphans(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) {
		c.OpTimeout, c.MaxSessions, c.MaxOrphans = 200*time.Millisecond, 1, 1
	})
	s := acquire(t, p)
	failed := make(chan error, 8)
	for range cap(failed) {
		go func() {
			s, err := p.Acquire(context.Background())
			if err == nil {
				s.Release()
			}
			failed <- err
		}()
	}
	until(t, "they wait", func() bool { return p.Stats().Waiting == cap(failed) })
	_, release := h.fault.Hang("C_GetSessionInfo")
	defer release()
	if err := ping(s); !errors.Is(err, sessionpool.ErrTimeout) {
		t.Errorf("got %v, want ErrTimeout", err)
	}
	s.Release()
	for range cap(failed) {
		if err := <-failed; !errors.Is(err, sessionpool.ErrSession) {
			t.Errorf("got %v, want ErrSession", err)
		}
	}
}

// Callers who cancel their calls on a sound HSM leave orphans for as long as
// the calls last. Others wait for that: the HSM is not down.
func TestCallersThatCancelDoNotDenyTheHSMToOthers(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.MaxOrphans = 1 })
	s := acquire(t, p)
	reached, release := h.fault.Hang("C_GetSessionInfo")
	defer release()
	ctx, cancel := context.WithCancel(context.Background())
	go func() { <-reached; cancel() }()
	err := s.Do(ctx, func(m sessionpool.Module, h pkcs11.SessionHandle) error {
		_, err := m.GetSessionInfo(h)
		return err
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
	s.Release()
	got := make(chan error, 1)
	go func() {
		s, err := p.Acquire(context.Background())
		if err == nil {
			s.Release()
		}
		got <- err
	}()
	until(t, "the next caller waits", func() bool { return p.Stats().Waiting == 1 || len(got) == 1 })
	release()
	if err := <-got; err != nil {
		t.Errorf("the next caller: %v", err)
	}
}

func TestACancelledCallThatDoesNotComeBackCountsAsHanging(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.OpTimeout, c.MaxOrphans = 200*time.Millisecond, 1 })
	s := acquire(t, p)
	reached, release := h.fault.Hang("C_GetSessionInfo")
	defer release()
	ctx, cancel := context.WithCancel(context.Background())
	go func() { <-reached; cancel() }()
	if err := s.Do(ctx, func(m sessionpool.Module, h pkcs11.SessionHandle) error {
		_, err := m.GetSessionInfo(h)
		return err
	}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
	s.Release()
	if _, err := p.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrSession) {
		t.Errorf("got %v, want ErrSession", err)
	}
	release()
	h.events.wait(t, 1, ofKind(sessionpool.OrphanReturned))
	acquire(t, p).Release()
}

func TestASearchForTheTokenThatHangsIsAnOrphanToo(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.OpTimeout, c.MaxOrphans = 200*time.Millisecond, 1 })
	h.fault.Fail("C_OpenSession", 1, pkcs11.CKR_DEVICE_REMOVED)
	_, release := h.fault.Hang("C_GetSlotList")
	defer release()
	if _, err := p.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrTimeout) {
		t.Errorf("got %v, want ErrTimeout", err)
	}
	if n := p.Stats().Orphans; n != 1 {
		t.Errorf("%d orphans, want one", n)
	}
	_, again := h.fault.Hang("C_GetSlotList")
	defer again()
	if _, err := p.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrSession) || errors.Is(err, sessionpool.ErrTimeout) {
		t.Errorf("at the cap: %v, want ErrSession at once", err)
	}
	release()
	again()
	h.events.wait(t, 1, ofKind(sessionpool.OrphanReturned))
	h.fault.Clear()
	acquire(t, p).Release()
}
