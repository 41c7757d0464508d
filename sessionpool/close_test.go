package sessionpool_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/sessionpool"
)

func TestCloseWaitsForSessionsInUseAndWakesThoseWhoWait(t *testing.T) {
	h := newHSM(t)
	p, err := sessionpool.New(h.cfg)
	if err != nil {
		t.Fatal(err)
	}
	full := h.pool(t, func(c *sessionpool.Config) { c.MaxSessions = 1 })
	s := acquire(t, p)
	waiting := make(chan error, 1)
	go func() {
		_, err := p.Acquire(context.Background())
		waiting <- err
	}()
	until(t, "somebody waits", func() bool { return p.Stats().Waiting == 1 })

	ctx, cancel := context.WithCancel(context.Background())
	closed := make(chan error, 2)
	go func() { closed <- p.Close(ctx) }()
	if err := <-waiting; !errors.Is(err, sessionpool.ErrClosed) {
		t.Errorf("the waiter got %v, want ErrClosed", err)
	}
	if _, err := p.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrClosed) {
		t.Errorf("acquiring from a closing pool: %v, want ErrClosed", err)
	}
	if err := ping(s); err != nil {
		t.Errorf("a session in use: %v, want it to go on working", err)
	}
	cancel()
	if err := <-closed; !errors.Is(err, context.Canceled) {
		t.Errorf("Close with a cancelled context: %v, want context.Canceled", err)
	}
	go func() { closed <- p.Close(context.Background()) }()
	s.Release()
	if err := <-closed; err != nil {
		t.Errorf("the second Close: %v", err)
	}
	if err := ping(s); !errors.Is(err, sessionpool.ErrClosed) {
		t.Errorf("a released session: %v, want ErrClosed", err)
	}
	// The other pool on the token does not notice.
	s = acquire(t, full)
	s.Release()
}

func TestTheLastPoolClosesEverySessionAndFinalisesTheModule(t *testing.T) {
	h := newHSM(t)
	a, b := h.pool(t), h.pool(t)
	for range 3 {
		s, u := acquire(t, a), acquire(t, b)
		s.Release()
		u.Release()
	}
	closePool(t, a)
	if n := h.fault.Calls("C_Finalize"); n != 0 {
		t.Errorf("C_Finalize was called %d times while another pool is open", n)
	}
	s := acquire(t, b)
	s.Release()
	closePool(t, b)
	closePool(t, b)
	if n := h.fault.Calls("C_Finalize"); n != 1 {
		t.Errorf("C_Finalize was called %d times, want once", n)
	}
	if n := h.fault.Sessions(); n != 0 {
		t.Errorf("%d sessions are open", n)
	}
}

func TestCloseDuringConstructionIsSafe(t *testing.T) {
	h := newHSM(t)
	p, err := sessionpool.New(h.cfg)
	if err != nil {
		t.Fatal(err)
	}
	reached, release := h.fault.Hang("C_OpenSession")
	defer release()
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			s, err := p.Acquire(context.Background())
			if err == nil {
				s.Release()
			} else if !errors.Is(err, sessionpool.ErrClosed) {
				t.Errorf("got %v, want a session or ErrClosed", err)
			}
		})
	}
	<-reached
	closed := make(chan error, 1)
	go func() { closed <- p.Close(context.Background()) }()
	until(t, "the pool is closing", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		_, err := p.Acquire(ctx)
		return errors.Is(err, sessionpool.ErrClosed)
	})
	release()
	group.Wait()
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if n := h.fault.Sessions(); n != 0 {
		t.Errorf("%d sessions are open", n)
	}
}

func TestCloseDoesNotWaitForeverForACallThatHangs(t *testing.T) {
	h := newHSM(t)
	h.cfg.OpTimeout = 200 * time.Millisecond
	p, err := sessionpool.New(h.cfg)
	if err != nil {
		t.Fatal(err)
	}
	s := acquire(t, p)
	_, release := h.fault.Hang("C_GetSessionInfo")
	if err := ping(s); !errors.Is(err, sessionpool.ErrTimeout) {
		t.Fatalf("got %v, want ErrTimeout", err)
	}
	s.Release()
	if err := p.Close(context.Background()); !errors.Is(err, sessionpool.ErrTimeout) {
		t.Errorf("got %v, want ErrTimeout", err)
	}
	if n := h.fault.Calls("C_Finalize"); n != 0 {
		t.Error("the module was finalised under a call")
	}
	release()
	until(t, "the orphan is closed", func() bool { return p.Stats().Orphans == 0 })
	h.cfg.OpTimeout = 0
	s = acquire(t, h.pool(t)) // which finalises it in the end
	s.Release()
}

func TestASessionMayBeReleasedDuringACall(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	s := acquire(t, p)
	reached, release := h.fault.Hang("C_GetSessionInfo")
	defer release()
	done := make(chan error, 1)
	go func() { done <- ping(s) }()
	<-reached
	s.Release()
	if n := p.Stats().Idle; n != 0 {
		t.Errorf("%d sessions are idle while the call goes on", n)
	}
	release()
	if err := <-done; err != nil {
		t.Error(err)
	}
	until(t, "the session is idle", func() bool { return p.Stats().Idle == 1 })
}

func TestASessionServesItsUsersOneAfterTheOther(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	s := acquire(t, p)
	defer s.Release()
	inside := 0
	var group sync.WaitGroup
	for range 16 {
		group.Go(func() {
			if err := s.Do(context.Background(), func(m sessionpool.Module, h pkcs11.SessionHandle) error {
				inside++ // the race detector watches
				_, err := m.GetSessionInfo(h)
				return err
			}); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if inside != 16 {
		t.Errorf("%d functions ran, want 16", inside)
	}
}

func TestAPanicOfTheFunctionIsThePanicOfItsCaller(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	s := acquire(t, p)
	defer s.Release()
	func() {
		defer func() {
			if v := recover(); v != "oops" {
				t.Errorf("recovered %v, want oops", v)
			}
		}()
		_ = s.Do(context.Background(), func(sessionpool.Module, pkcs11.SessionHandle) error { panic("oops") })
	}()
	if err := ping(s); err != nil {
		t.Errorf("after the panic: %v", err)
	}
}

func TestAFunctionThatEndsItsGoroutineEndsTheCallers(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	s := acquire(t, p)
	defer s.Release()
	returned := false
	var group sync.WaitGroup
	group.Go(func() {
		_ = s.Do(context.Background(), func(sessionpool.Module, pkcs11.SessionHandle) error {
			goexit()
			return nil
		})
		returned = true
	})
	group.Wait()
	if returned {
		t.Error("Do returned")
	}
	if err := ping(s); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func TestTheModuleOfDoIsGoodForItsFunctionOnly(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	s := acquire(t, p)
	defer s.Release()
	var kept sessionpool.Module
	var keptHandle pkcs11.SessionHandle
	if err := s.Do(context.Background(), func(m sessionpool.Module, h pkcs11.SessionHandle) error {
		kept, keptHandle = m, h
		for name, call := range map[string]func() error{
			"C_Initialize":   func() error { return m.Initialize() },
			"C_Finalize":     m.Finalize,
			"C_Logout":       func() error { return m.Logout(h) },
			"C_CloseSession": func() error { return m.CloseSession(h) },
			"C_OpenSession":  func() error { _, err := m.OpenSession(0, 0); return err },
			"C_Login":        func() error { return m.Login(h, pkcs11.CKU_USER, "1234") },
		} {
			if err := call(); !errors.Is(err, sessionpool.ErrUnsupported) {
				t.Errorf("%s: %v, want ErrUnsupported", name, err)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := kept.GetSessionInfo(keptHandle); !errors.Is(err, sessionpool.ErrClosed) {
		t.Errorf("after the function: %v, want ErrClosed", err)
	}
}

// Each session that hangs takes as long as a call may: not one after the other.
func TestCloseClosesSessionsSideBySide(t *testing.T) {
	h := newHSM(t)
	const idle = 3
	together := &meeting{all: make(chan struct{})}
	together.missing.Store(idle)
	p := h.pool(t, func(c *sessionpool.Config) {
		c.Wrap = func(m sessionpool.Module) sessionpool.Module {
			return &closesTogether{Module: h.fault.Wrap(m), meeting: together}
		}
	})
	sessions := make([]*sessionpool.Session, idle)
	for i := range sessions {
		sessions[i] = acquire(t, p)
	}
	for _, s := range sessions {
		s.Release()
	}
	closePool(t, p)
	if n := p.Stats().Timeouts; n != 0 {
		t.Errorf("%d sessions were waited for one after the other", n)
	}
}

// meeting lets go when all have come.
type meeting struct {
	missing atomic.Int32
	all     chan struct{}
}

// closesTogether is a library whose C_CloseSession returns when a number of
// calls have come.
type closesTogether struct {
	sessionpool.Module
	*meeting
}

func (m *closesTogether) CloseSession(h pkcs11.SessionHandle) error {
	if m.missing.Add(-1) == 0 {
		close(m.all)
	}
	<-m.all
	return m.Module.CloseSession(h)
}
