package sessionpool_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

func TestAReleasedSessionIsReused(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	s := acquire(t, p)
	first := handle(t, s)
	s.Release()
	s = acquire(t, p)
	defer s.Release()
	if again := handle(t, s); again != first {
		t.Errorf("the second session has handle %d, want that of the first, %d", again, first)
	}
	if st := p.Stats(); st.Opened != 2 || st.Reused != 1 || st.Logins != 1 {
		t.Errorf("stats %+v, want 2 opened (one is the anchor), 1 reused, 1 login", st)
	}
}

func TestTheNewestIdleSessionIsReusedFirst(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	old, young := acquire(t, p), acquire(t, p)
	want := handle(t, young)
	old.Release()
	young.Release()
	s := acquire(t, p)
	defer s.Release()
	if got := handle(t, s); got != want {
		t.Errorf("got session %d, want the one released last, %d", got, want)
	}
}

func TestWithoutTheCacheEachSessionIsClosedPhysically(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.DisableCache = true })
	for range 3 {
		s := acquire(t, p)
		s.Release()
	}
	if st := p.Stats(); st.Open != 0 || st.Idle != 0 || st.Reused != 0 || st.ClosedAsked != 3 {
		t.Errorf("stats %+v, want nothing open, idle or reused, 3 closed", st)
	}
	if n := h.fault.Sessions(); n != 1 {
		t.Errorf("%d sessions are open in the module, want the anchor only", n)
	}
	if st := p.Stats(); st.Logins != 1 {
		t.Errorf("%d logins, want 1: the anchor keeps it", st.Logins)
	}
}

func TestAnIdleSessionIsClosedAfterTheTimeoutWithoutTraffic(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.IdleTimeout = 50 * time.Millisecond })
	s := acquire(t, p)
	s.Release()
	h.events.wait(t, 2, closedBy(sessionpool.CloseIdle)) // the session, then the anchor
	if n := h.fault.Sessions(); n != 0 {
		t.Errorf("%d sessions are open in the module, want none", n)
	}
	if st := p.Stats(); st.Open != 0 || st.LoggedIn {
		t.Errorf("stats %+v, want nothing open and nobody logged in", st)
	}
	// The next morning.
	pub := makeKey(t, p, "key")
	s = acquire(t, p)
	defer s.Release()
	mustSign(t, s, pub, "key")
}

func TestAnIdleSessionIsClosedAfterTheTimeoutUnderTraffic(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.IdleTimeout = 100 * time.Millisecond })
	used, unused := acquire(t, p), acquire(t, p)
	defer used.Release()
	before := handle(t, used)
	unused.Release()
	until(t, "the unused session is closed", func() bool {
		if err := ping(used); err != nil {
			t.Error(err)
		}
		return p.Stats().ClosedIdle == 1
	})
	if st := p.Stats(); st.Logins != 1 || !st.LoggedIn || handle(t, used) != before {
		t.Errorf("stats %+v, want the used session still open and one login", st)
	}
}

func TestAShorterIdleTimeoutOfAnotherPoolHoldsFromNowOn(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	acquire(t, p).Release()
	h.pool(t, func(c *sessionpool.Config) { c.IdleTimeout = 50 * time.Millisecond })
	h.events.wait(t, 1, closedBy(sessionpool.CloseIdle))
}

func TestASessionIsReusedOnlyForItsKind(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	flags := func(s *sessionpool.Session) uint {
		var info pkcs11.SessionInfo
		if err := s.Do(context.Background(), func(m sessionpool.Module, h pkcs11.SessionHandle) (err error) {
			info, err = m.GetSessionInfo(h)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return info.Flags
	}
	ro := acquire(t, p)
	if flags(ro)&pkcs11.CKF_RW_SESSION != 0 {
		t.Error("a session is read-write that was not asked to be")
	}
	roHandle := handle(t, ro)
	ro.Release()
	rw := acquire(t, p, sessionpool.ReadWrite())
	if flags(rw)&pkcs11.CKF_RW_SESSION == 0 {
		t.Error("a read-write session is read-only")
	}
	rwHandle := handle(t, rw)
	rw.Release()
	ro, rw = acquire(t, p), acquire(t, p, sessionpool.ReadWrite())
	defer ro.Release()
	defer rw.Release()
	if handle(t, ro) != roHandle || handle(t, rw) != rwHandle {
		t.Error("sessions were not reused by kind")
	}
}

func TestAReadOnlySessionWorksWhileAReadWriteOneExists(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	rw := acquire(t, p, sessionpool.ReadWrite())
	defer rw.Release()
	pub, err := generate(rw, "key")
	if err != nil {
		t.Fatal(err)
	}
	ro := acquire(t, p)
	defer ro.Release()
	mustSign(t, ro, pub, "key")
	mustSign(t, rw, pub, "key")
}

func TestAPoolWithoutPINHasPublicSessionsOfItsOwn(t *testing.T) {
	h := newHSM(t)
	public := h.pool(t, func(c *sessionpool.Config) { c.PIN = nil })
	s := acquire(t, public)
	first := handle(t, s)
	s.Release()
	if n := h.fault.Calls("C_Login"); n != 0 {
		t.Errorf("%d logins for a public session", n)
	}
	user := h.pool(t)
	s = acquire(t, user)
	defer s.Release()
	if handle(t, s) == first {
		t.Error("a user's session is the public one from the cache")
	}
}

func TestEncryptedSessionsAreNotGivenFromAPlaintextTransport(t *testing.T) {
	h := newHSM(t)
	plain := h.pool(t, func(c *sessionpool.Config) { c.Plaintext = true })
	if _, err := plain.Acquire(context.Background(), sessionpool.Encrypted()); !errors.Is(err, sessionpool.ErrUnsupported) {
		t.Errorf("got %v, want ErrUnsupported", err)
	}
	inside := h.pool(t)
	s := acquire(t, inside, sessionpool.Encrypted())
	s.Release()
}

func TestABypassSessionIsFreshAndNeverCached(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	s := acquire(t, p)
	cached := handle(t, s)
	s.Release()
	b := acquire(t, p, sessionpool.Bypass())
	if handle(t, b) == cached {
		t.Error("a bypass session came from the cache")
	}
	b.Release()
	if st := p.Stats(); st.Idle != 1 || st.ClosedAsked != 1 {
		t.Errorf("stats %+v, want the cached session idle and the other closed", st)
	}
}

func TestCloseEndsThePhysicalSession(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	s := acquire(t, p)
	s.Close()
	s.Close()
	s.Release()
	if st := p.Stats(); st.Open != 0 || st.ClosedAsked != 1 {
		t.Errorf("stats %+v, want one session closed", st)
	}
	if n := h.fault.Sessions(); n != 1 {
		t.Errorf("%d sessions are open in the module, want the anchor only", n)
	}
}

func TestAOneTimePINMakesALoginOfItsOwn(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	pub := makeKey(t, p, "key")
	before := p.Stats()
	s := acquire(t, p, sessionpool.OneTimePIN(testhsm.PIN))
	mustSign(t, s, pub, "key")
	if st := p.Stats(); st.Logins != before.Logins || st.Open != before.Open {
		t.Errorf("the shared sessions changed: %+v, before %+v", st, before)
	}
	s.Release()
	if st := p.Stats(); st.Idle != before.Idle {
		t.Errorf("%d idle sessions, want %d: a one-time session is not cached", st.Idle, before.Idle)
	}
	shared := acquire(t, p)
	defer shared.Release()
	mustSign(t, shared, pub, "key")
	if err := ping(s); !errors.Is(err, sessionpool.ErrClosed) {
		t.Errorf("using the released session: %v, want ErrClosed", err)
	}
}

func TestAWrongOneTimePINLeavesTheSharedLoginAlone(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	pub := makeKey(t, p, "key")
	if _, err := p.Acquire(context.Background(), sessionpool.OneTimePIN("wrong-otp")); !errors.Is(err, sessionpool.ErrPIN) {
		t.Errorf("got %v, want ErrPIN", err)
	}
	if _, err := p.Acquire(context.Background(), sessionpool.OneTimePIN("")); !errors.Is(err, sessionpool.ErrPIN) {
		t.Errorf("an empty one-time PIN: got %v, want ErrPIN", err)
	}
	s := acquire(t, p)
	defer s.Release()
	mustSign(t, s, pub, "key")
}

func TestOneFileIsOneModuleUnderWhateverName(t *testing.T) {
	h := newHSM(t)
	link := filepath.Join(t.TempDir(), "link.so")
	if err := os.Symlink(h.Module, link); err != nil {
		t.Fatal(err)
	}
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	relative, err := filepath.Rel(wd, h.Module)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{h.Module, link, relative} {
		p := h.pool(t, func(c *sessionpool.Config) { c.Module = path })
		s := acquire(t, p)
		s.Release()
		if st := p.Stats(); st.Logins != 1 {
			t.Errorf("%d logins by way of %s, want 1 in all", st.Logins, path)
		}
	}
	if n := h.fault.Calls("C_Initialize"); n != 1 {
		t.Errorf("C_Initialize was called %d times, want once", n)
	}
}

func TestPoolsOnOneTokenShareTheCache(t *testing.T) {
	h := newHSM(t)
	a, b := h.pool(t), h.pool(t)
	s := acquire(t, a)
	want := handle(t, s)
	s.Release()
	s = acquire(t, b)
	defer s.Release()
	if handle(t, s) != want {
		t.Error("the second pool did not reuse the session of the first")
	}
}

func TestOneLoginAndNoMoreSessionsThanWereInUse(t *testing.T) {
	tok := testhsm.New(t)
	spied, calls := testhsm.Spy(t, tok)
	p, err := sessionpool.New(sessionpool.Config{
		Module: spied, TokenLabel: tok.Labels[0], PIN: sessionpool.StaticPIN(testhsm.PIN),
	})
	if err != nil {
		t.Fatal(err)
	}
	const most = 4
	for range 5 {
		var group sync.WaitGroup
		for range most {
			group.Go(func() {
				s := acquire(t, p)
				defer s.Release()
				for range 3 {
					if err := ping(s); err != nil {
						t.Error(err)
					}
				}
			})
		}
		group.Wait()
	}
	opened := calls("C_OpenSession")
	closePool(t, p)
	if n := calls("C_Login"); n != 1 {
		t.Errorf("C_Login was called %d times, want once", n)
	}
	if opened == 0 || opened > most+1 {
		t.Errorf("C_OpenSession was called %d times, want %d and the anchor at most", opened, most)
	}
	if o, c := calls("C_OpenSession"), calls("C_CloseSession"); o != c {
		t.Errorf("%d sessions were opened, %d closed", o, c)
	}
	if n := calls("C_Logout"); n != 0 {
		t.Errorf("C_Logout was called %d times, want never", n)
	}
	if i, f := calls("C_Initialize"), calls("C_Finalize"); i != 1 || f != 1 {
		t.Errorf("C_Initialize was called %d times, C_Finalize %d times, want once each", i, f)
	}
}

func TestWhoDoesNotWaitIsToldSo(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.MaxSessions = 1 })
	s := acquire(t, p, sessionpool.NoWait())
	if _, err := p.Acquire(context.Background(), sessionpool.NoWait()); !errors.Is(err, sessionpool.ErrUnsuitable) || errors.Is(err, sessionpool.ErrSession) {
		t.Errorf("at the limit: %v, want ErrUnsuitable", err)
	}
	if _, err := p.Acquire(context.Background(), sessionpool.Avoid(s.Token())); !errors.Is(err, sessionpool.ErrUnsuitable) {
		t.Errorf("avoiding the only token: %v, want ErrUnsuitable", err)
	}
	s.Release()
}

func TestResetClosesEverySessionOnceItIsReleased(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	pub := makeKey(t, p, "key")
	idle, used := acquire(t, p), acquire(t, p)
	idle.Release()
	p.Reset()
	if n := h.fault.Sessions(); n != 2 {
		t.Errorf("%d sessions are open, want the one in use and the anchor", n)
	}
	mustSign(t, used, pub, "key")
	used.Release()
	if n := h.fault.Sessions(); n != 0 {
		t.Errorf("%d sessions are open, want none", n)
	}
	s := acquire(t, p)
	defer s.Release()
	mustSign(t, s, pub, "key")
}
