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

// A released session is used once more, by mistake, while the next one of the
// same physical session is released.
func TestAReleasedSessionCannotKeepTheNextOneFromBeingReleased(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.MaxSessions = 1 })
	old := acquire(t, p)
	old.Release()
	stop := make(chan struct{})
	var group sync.WaitGroup
	group.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := ping(old); !errors.Is(err, sessionpool.ErrClosed) {
				t.Errorf("the released session: %v, want ErrClosed", err)
				return
			}
		}
	})
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for range 20000 {
		s, err := p.Acquire(ctx)
		if err != nil {
			t.Errorf("the session was not given back: %v", err)
			break
		}
		s.Release()
	}
	close(stop)
	group.Wait()
}

// Releasing a session while some of its users are in Do and others wait gives
// the physical session back when the last call is over, not before.
func TestAPhysicalSessionIsNeverUsedByTwo(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.MaxSessions = 1 })
	var inside atomic.Int32
	use := func(sessionpool.Module, pkcs11.SessionHandle) error {
		if inside.Add(1) != 1 {
			t.Error("two functions run on one physical session")
		}
		inside.Add(-1)
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for range 3000 {
		s, err := p.Acquire(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var group sync.WaitGroup
		for range 3 {
			group.Go(func() {
				for s.Do(ctx, use) == nil {
				}
			})
		}
		s.Release()
		next, err := p.Acquire(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := next.Do(ctx, use); err != nil {
			t.Error(err)
		}
		next.Release()
		group.Wait()
	}
}

// Close during a call closes the physical session, whoever gives it back.
func TestASessionThatIsClosedDuringACallIsNotCached(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	nothing := func(sessionpool.Module, pkcs11.SessionHandle) error { return nil }
	for range 2000 {
		s := acquire(t, p)
		var group sync.WaitGroup
		group.Go(func() {
			for s.Do(context.Background(), nothing) == nil {
			}
		})
		s.Close()
		group.Wait()
		if st := p.Stats(); st.Open != 0 {
			t.Fatalf("stats %+v, want nothing open", st)
		}
	}
}

func TestAPanicUnderRetryReleasesItsSession(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	func() {
		defer func() {
			if v := recover(); v != "oops" {
				t.Errorf("recovered %v, want oops", v)
			}
		}()
		_ = sessionpool.Retry(context.Background(), p, func(*sessionpool.Session) error { panic("oops") })
	}()
	if st := p.Stats(); st.InUse != 0 {
		t.Errorf("stats %+v, want no session in use", st)
	}
	if t.Failed() {
		t.FailNow()
	}
}

func TestAPanicLeavesNoOperationToTheNextUser(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	s := acquire(t, p)
	func() {
		defer func() { _ = recover() }()
		_ = s.Do(context.Background(), func(m sessionpool.Module, h pkcs11.SessionHandle) error {
			if err := m.FindObjectsInit(h, nil); err != nil {
				t.Error(err)
			}
			panic("oops")
		})
	}()
	s.Release()
	s = acquire(t, p)
	defer s.Release()
	err := s.Do(context.Background(), func(m sessionpool.Module, h pkcs11.SessionHandle) error {
		if _, err := m.GetSessionInfo(h); err != nil {
			return err
		}
		return errors.Join(m.FindObjectsInit(h, nil), m.FindObjectsFinal(h))
	})
	if err != nil {
		t.Errorf("after the panic of another: %v", err)
	}
}
