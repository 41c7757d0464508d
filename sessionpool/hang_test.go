package sessionpool_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

func TestACallThatHangsLetsItsCallerGo(t *testing.T) {
	cases := []struct {
		name   string
		ctx    func() (context.Context, context.CancelFunc)
		want   error
		unwant error
	}{
		{"at OpTimeout", func() (context.Context, context.CancelFunc) {
			return context.WithCancel(context.Background())
		}, sessionpool.ErrTimeout, context.Canceled},
		{"at the deadline of its context", func() (context.Context, context.CancelFunc) {
			return context.WithTimeout(context.Background(), 20*time.Millisecond)
		}, context.DeadlineExceeded, context.Canceled},
		{"when its context is cancelled", func() (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(context.Background())
			time.AfterFunc(20*time.Millisecond, cancel)
			return ctx, cancel
		}, context.Canceled, sessionpool.ErrTimeout},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			h := newHSM(t)
			p := h.pool(t, func(c *sessionpool.Config) { c.OpTimeout, c.MaxSessions = 300*time.Millisecond, 1 })
			pub := makeKey(t, p, "key")
			s := acquire(t, p)
			mustSign(t, s, pub, "key")
			reached, release := h.fault.Hang("C_Sign")
			defer release()
			ctx, cancel := c.ctx()
			defer cancel()
			digest := sha256.Sum256(nil)
			_, err := sign(ctx, s, "key", digest[:])
			if !errors.Is(err, c.want) || errors.Is(err, c.unwant) {
				t.Errorf("got %v, want %v and not %v", err, c.want, c.unwant)
			}
			<-reached
			if st := p.Stats(); st.Orphans != 1 || st.Open != 0 {
				t.Errorf("stats %+v, want one orphan that takes no place", st)
			}
			if err := ping(s); !errors.Is(err, sessionpool.ErrSession) {
				t.Errorf("the session that hangs: %v, want ErrSession", err)
			}
			s.Release()
			// It was the last worker of a pool of one: there is another.
			s = acquire(t, p)
			mustSign(t, s, pub, "key")
			s.Release()
			release()
			h.events.wait(t, 1, ofKind(sessionpool.OrphanReturned))
			if n := h.fault.Sessions(); n != 2 {
				t.Errorf("%d sessions are open in the module, want the anchor and one: the orphan is closed", n)
			}
			if st := p.Stats(); st.Orphans != 0 || st.Idle != 1 {
				t.Errorf("stats %+v, want no orphan and one idle session", st)
			}
		})
	}
}

func TestAFunctionOfManyCallsMayLastLongerThanOneCall(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.OpTimeout = 200 * time.Millisecond })
	s := acquire(t, p)
	defer s.Release()
	h.fault.Delay("C_GetSessionInfo", 30*time.Millisecond)
	err := s.Do(context.Background(), func(m sessionpool.Module, sh pkcs11.SessionHandle) error {
		for range 10 {
			if _, err := m.GetSessionInfo(sh); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Errorf("ten short calls: %v", err)
	}
}

func TestOrphansAreCapped(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.OpTimeout, c.MaxOrphans = 200*time.Millisecond, 2 })
	pub := makeKey(t, p, "key")
	digest := sha256.Sum256(nil)
	for range 2 {
		s := acquire(t, p)
		mustSign(t, s, pub, "key")
		_, release := h.fault.Hang("C_Sign")
		defer release()
		if _, err := sign(context.Background(), s, "key", digest[:]); !errors.Is(err, sessionpool.ErrTimeout) {
			t.Fatalf("got %v, want ErrTimeout", err)
		}
		s.Release()
	}
	if _, err := p.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrSession) {
		t.Errorf("at the cap: %v, want ErrSession at once", err)
	}
}

func TestHangsOutsideOfCallersFunctionsAreBoundedToo(t *testing.T) {
	for _, function := range []string{"C_OpenSession", "C_Login", "C_GetSessionInfo"} {
		t.Run(function, func(t *testing.T) {
			h := newHSM(t)
			p := h.pool(t, func(c *sessionpool.Config) { c.OpTimeout = 200 * time.Millisecond })
			_, release := h.fault.Hang(function)
			defer release()
			_, err := p.Acquire(context.Background())
			if !errors.Is(err, sessionpool.ErrTimeout) && !errors.Is(err, sessionpool.ErrSession) {
				t.Errorf("got %v, want ErrTimeout or ErrSession", err)
			}
			release()
			until(t, "the orphan is back", func() bool { return p.Stats().Orphans == 0 })
			s := acquire(t, p)
			s.Release()
		})
	}
	for _, function := range []string{"C_Initialize", "C_GetSlotList"} {
		t.Run(function, func(t *testing.T) {
			h := newHSM(t)
			_, release := h.fault.Hang(function)
			h.cfg.OpTimeout = 200 * time.Millisecond
			if _, err := sessionpool.New(h.cfg); !errors.Is(err, sessionpool.ErrTimeout) {
				t.Errorf("got %v, want ErrTimeout", err)
			}
			release()
			// The late answer is taken in, and the next pool works.
			h.cfg.OpTimeout = 0
			s := acquire(t, h.pool(t))
			s.Release()
		})
	}
}

// served is a token in another process, reached through p11-kit.
func served(t *testing.T, opTimeout time.Duration) (*testhsm.Server, *sessionpool.Pool) {
	tok := testhsm.NewDetached(t)
	server := testhsm.Serve(t, tok)
	p, err := sessionpool.New(sessionpool.Config{
		Module: server.Client(), TokenLabel: tok.Labels[0], PIN: sessionpool.StaticPIN(testhsm.PIN), OpTimeout: opTimeout,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		_ = p.Close(ctx) // the server may be dead
	})
	return server, p
}

func TestALibraryThatIsReallyStuckIsSurvived(t *testing.T) {
	server, p := served(t, 300*time.Millisecond)
	pub := makeKey(t, p, "key")
	s := acquire(t, p)
	mustSign(t, s, pub, "key")
	digest := sha256.Sum256([]byte("data"))

	server.Stop()
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := sign(ctx, s, "key", digest[:]); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("stopped, with a deadline: %v, want context.DeadlineExceeded", err)
	}
	s.Release()
	if _, err := p.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrTimeout) && !errors.Is(err, sessionpool.ErrSession) {
		t.Errorf("stopped: %v, want ErrTimeout or ErrSession", err)
	}
	if n := p.Stats().Orphans; n == 0 {
		t.Error("no orphan is counted")
	}

	server.Continue()
	until(t, "the orphans are back", func() bool { return p.Stats().Orphans == 0 })
	s = acquire(t, p)
	mustSign(t, s, pub, "key")

	server.Kill()
	if _, err := sign(context.Background(), s, "key", digest[:]); !errors.Is(err, sessionpool.ErrSession) {
		t.Errorf("killed: %v, want ErrSession", err)
	}
	s.Release()
	if _, err := p.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrSession) {
		t.Errorf("killed: %v, want ErrSession", err)
	}

	server.Restart()
	until(t, "the HSM is used again", func() bool {
		s, err := p.Acquire(context.Background())
		if err != nil {
			return false
		}
		defer s.Release()
		_, err = sign(context.Background(), s, "key", digest[:])
		return err == nil
	})
	s = acquire(t, p)
	defer s.Release()
	mustSign(t, s, pub, "key")
}

// Whatever the pool does for its caller, the caller can leave.
func TestAcquireEndsWithItsContextWhereverTheLibraryHangs(t *testing.T) {
	nothing := func(*hsm, *sessionpool.Pool) {}
	suspect := func(h *hsm, p *sessionpool.Pool) {
		lost, idle := acquire(t, p), acquire(t, p)
		idle.Release()
		h.fault.Fail("C_GetSessionInfo", 1, pkcs11.CKR_DEVICE_REMOVED)
		if ping(lost) == nil {
			t.Error("the fault did not come")
		}
		lost.Release()
		h.events.wait(t, 1, closedBy(sessionpool.CloseLost))
	}
	for _, c := range []struct {
		name, function string
		prepare        func(*hsm, *sessionpool.Pool)
		opts           []sessionpool.Option
	}{
		{"opening a session", "C_OpenSession", nothing, nil},
		{"logging in", "C_Login", nothing, nil},
		{"making room for another kind", "C_CloseSession", func(_ *hsm, p *sessionpool.Pool) {
			one, two := acquire(t, p), acquire(t, p)
			one.Release()
			two.Release()
		}, []sessionpool.Option{sessionpool.ReadWrite()}},
		{"asking a session under suspicion", "C_GetSessionInfo", suspect, nil},
		{"closing a session under suspicion", "C_CloseSession", func(h *hsm, p *sessionpool.Pool) {
			suspect(h, p)
			h.fault.Fail("C_GetSessionInfo", 1, pkcs11.CKR_DEVICE_ERROR)
		}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHSM(t)
			p := h.pool(t, func(c *sessionpool.Config) { c.MaxSessions, c.OpTimeout = 2, time.Hour })
			c.prepare(h, p)
			reached, release := h.fault.Hang(c.function)
			defer release()
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			ended := make(chan error, 1)
			go func() {
				s, err := p.Acquire(ctx, c.opts...)
				if err == nil {
					s.Release()
				}
				ended <- err
			}()
			<-reached
			cancel()
			// Where the call is made in the background there may be a session.
			select {
			case err := <-ended:
				if err != nil && !errors.Is(err, context.Canceled) {
					t.Errorf("got %v, want context.Canceled", err)
				}
			case <-time.After(20 * time.Second):
				t.Error("it did not end")
				release()
				if err := <-ended; err != nil {
					t.Log(err)
				}
			}
		})
	}
}

func TestAcquiringAOneTimeSessionEndsWithItsContext(t *testing.T) {
	h := newHSM(t)
	initialised := make(chan struct{}, 2)
	p := h.pool(t, func(c *sessionpool.Config) {
		c.Wrap = func(m sessionpool.Module) sessionpool.Module {
			return h.fault.Wrap(&tellsInitialize{Module: m, done: initialised})
		}
	})
	<-initialised
	reached, release := h.fault.Hang("C_Initialize")
	defer func() {
		release()
		<-initialised // before the test's directory goes
	}()
	ctx, cancel := context.WithCancel(context.Background())
	go func() { <-reached; cancel() }()
	_, err := p.Acquire(ctx, sessionpool.OneTimePIN(testhsm.PIN))
	if !errors.Is(err, context.Canceled) || errors.Is(err, sessionpool.ErrUnsupported) {
		t.Errorf("got %v, want context.Canceled", err)
	}
}

// tellsInitialize tells when C_Initialize has returned.
type tellsInitialize struct {
	sessionpool.Module
	done chan<- struct{}
}

func (m *tellsInitialize) Initialize(opts ...pkcs11.InitializeOption) error {
	defer func() { m.done <- struct{}{} }()
	return m.Module.Initialize(opts...)
}

func TestDoEndsWithItsContextWhileALostSessionIsReplaced(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	s := acquire(t, p)
	defer s.Release()
	h.fault.Fail("C_GetSessionInfo", 1, pkcs11.CKR_DEVICE_REMOVED)
	if ping(s) == nil {
		t.Error("the fault did not come")
	}
	reached, release := h.fault.Hang("C_CloseSession")
	defer release()
	ctx, cancel := context.WithCancel(context.Background())
	go func() { <-reached; cancel() }()
	if err := s.Do(ctx, func(sessionpool.Module, pkcs11.SessionHandle) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
}
