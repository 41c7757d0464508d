package sessionpool_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/sessionpool"
)

func TestWhoWaitsCanBeToldToGiveUp(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.MaxSessions = 1 })
	s := acquire(t, p)
	stop, result := make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := p.Acquire(context.Background(), sessionpool.WaitUntil(stop))
		result <- err
	}()
	until(t, "somebody waits", func() bool { return p.Stats().Waiting == 1 })
	close(stop)
	if err := <-result; !errors.Is(err, sessionpool.ErrUnsuitable) || errors.Is(err, sessionpool.ErrSession) {
		t.Errorf("got %v, want ErrUnsuitable", err)
	}
	if n := p.Stats().Waiting; n != 0 {
		t.Errorf("%d callers wait", n)
	}
	s.Release()
	s, err := p.Acquire(context.Background(), sessionpool.WaitUntil(stop))
	if err != nil {
		t.Fatalf("a free session, without waiting: %v", err)
	}
	s.Release()
}

// Each call is in time, all of them together are not.
func TestOpeningASessionTakesNoLongerThanOneCallMay(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.OpTimeout = 500 * time.Millisecond })
	for _, function := range []string{"C_OpenSession", "C_Login", "C_GetSessionInfo"} {
		h.fault.Delay(function, 300*time.Millisecond)
	}
	_, err := p.Acquire(context.Background())
	if !errors.Is(err, sessionpool.ErrTimeout) || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want ErrTimeout, and nothing about a deadline of the caller", err)
	}
	h.events.wait(t, 1, ofKind(sessionpool.CallTimedOut))
	h.fault.Clear()
	acquire(t, p).Release()
}

// Sessions of an HSM that has stopped answering are not asked one after the
// other whether they still work.
func TestTheFirstSessionThatHangsSpeaksForAll(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.OpTimeout = 500 * time.Millisecond })
	makeKey(t, p, "key")
	idle := []*sessionpool.Session{acquire(t, p), acquire(t, p), acquire(t, p)}
	for _, s := range idle {
		s.Release()
	}
	reached, release := h.fault.Hang("C_GetSessionInfo")
	defer release()
	s := acquire(t, p)
	if err := ping(s); !errors.Is(err, sessionpool.ErrTimeout) {
		t.Fatalf("a call that hangs: %v, want ErrTimeout", err)
	}
	<-reached
	s.Release()
	_, again := h.fault.Hang("C_GetSessionInfo")
	defer again()
	if _, err := p.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrTimeout) {
		t.Errorf("got %v, want ErrTimeout", err)
	}
	if n := p.Stats().Orphans; n != 2 {
		t.Errorf("%d calls hang, want two", n)
	}
	release()
	again()
	acquire(t, p).Release()
}

func TestAnIdleSessionIsHadOrNotAtOnce(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	if _, err := p.Acquire(context.Background(), sessionpool.Idle()); !errors.Is(err, sessionpool.ErrUnsuitable) || errors.Is(err, sessionpool.ErrSession) {
		t.Errorf("from an empty cache: %v, want ErrUnsuitable", err)
	}
	if n := h.fault.Calls("C_OpenSession"); n != 0 {
		t.Errorf("%d sessions were opened", n)
	}
	acquire(t, p).Release()
	s := acquire(t, p, sessionpool.Idle())
	defer s.Release()
	if err := ping(s); err != nil {
		t.Error(err)
	}
	if _, err := p.Acquire(context.Background(), sessionpool.Idle()); !errors.Is(err, sessionpool.ErrUnsuitable) {
		t.Errorf("the only session is in use: %v, want ErrUnsuitable", err)
	}
	// Who waits for an idle one does not keep others from opening one.
	stop, result := make(chan struct{}), make(chan error, 2)
	for range cap(result) {
		go func() {
			s, err := p.Acquire(context.Background(), sessionpool.Idle(), sessionpool.WaitUntil(stop))
			if err == nil {
				defer s.Close()
			}
			result <- err
		}()
	}
	until(t, "both wait", func() bool { return p.Stats().Waiting == 2 })
	other := acquire(t, p, sessionpool.NoWait())
	if n := p.Stats().Waiting; n != 2 {
		t.Errorf("%d wait, want both", n)
	}
	other.Release()
	if err := <-result; err != nil {
		t.Errorf("a session was released: %v", err)
	}
	close(stop)
	if err := <-result; !errors.Is(err, sessionpool.ErrUnsuitable) {
		t.Errorf("told to give up: %v, want ErrUnsuitable", err)
	}
	for _, o := range []sessionpool.Option{sessionpool.ReadWrite(), sessionpool.Bypass(), sessionpool.Public(), sessionpool.OneTimePIN("1")} {
		if o.Usual() {
			t.Errorf("%v is met by usual sessions", o)
		}
	}
	for _, o := range []sessionpool.Option{sessionpool.Encrypted(), sessionpool.Avoid(s.Token()), sessionpool.NoWait()} {
		if !o.Usual() {
			t.Errorf("%v is not met by usual sessions", o)
		}
	}
}

func TestACheckedConfigurationNeedsNoModule(t *testing.T) {
	if err := (sessionpool.Config{}).Check(); err != nil {
		t.Errorf("the zero value: %v", err)
	}
	if err := (sessionpool.Config{MaxSessions: -1}).Check(); !errors.Is(err, sessionpool.ErrConfig) {
		t.Errorf("MaxSessions -1: %v, want ErrConfig", err)
	}
}

func TestWhoeverGivesUpDoesNotBlameTheHSM(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	s := acquire(t, p)
	s.Close()
	h.fault.FailAll("C_OpenSession", pkcs11.CKR_GENERAL_ERROR)
	reached, release := h.fault.Hang("C_OpenSession")
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		<-reached
		cancel()
		release()
	}()
	_, err := p.Acquire(ctx)
	if !errors.Is(err, context.Canceled) || errors.Is(err, sessionpool.ErrSession) {
		t.Errorf("got %v, want context.Canceled alone", err)
	}
	if n, _ := h.events.count(ofKind(sessionpool.HSMDown)); n != 0 {
		t.Error("the HSM is said to be down")
	}
	h.fault.Clear()
}
