package sessionpool_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

func TestARestartThatIsGivenUpLeaksNoSession(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t, func(c *sessionpool.Config) { c.OpTimeout = 300 * time.Millisecond })
	stuck, one, two := acquire(t, p), acquire(t, p), acquire(t, p)
	reached, release := h.fault.Hang("C_GetSessionInfo")
	defer release()
	if ping(stuck) == nil {
		t.Error("the call did not hang")
	}
	<-reached
	stuck.Release()
	for _, s := range []*sessionpool.Session{one, two} {
		h.fault.Fail("C_GetSessionInfo", 1, pkcs11.CKR_DEVICE_REMOVED)
		if ping(s) == nil {
			t.Error("the fault did not come")
		}
	}
	// The next session restarts the library, in vain: a call hangs in it. The
	// other meets the shut gate.
	var group sync.WaitGroup
	for _, s := range []*sessionpool.Session{one, two} {
		group.Go(func() { _ = ping(s) })
	}
	group.Wait()
	one.Release()
	two.Release()
	release()
	until(t, "the orphan is back", func() bool { return p.Stats().Orphans == 0 })
	closePool(t, p)
	if n := h.fault.Sessions(); n != 0 {
		t.Errorf("%d sessions are open after Close", n)
	}
}

func TestARestartSparesWhoElseUsesTheLibrary(t *testing.T) {
	h := newHSM(t)
	p := h.pool(t)
	pub := makeKey(t, p, "key")
	other, theirs := someoneElse(t, h)
	digest := sha256.Sum256(nil)
	fails := func() {
		s := acquire(t, p)
		defer s.Release()
		h.fault.Fail("C_Sign", 1, pkcs11.CKR_DEVICE_ERROR)
		if _, err := sign(context.Background(), s, "key", digest[:]); !errors.Is(err, sessionpool.ErrSession) {
			t.Errorf("got %v, want ErrSession", err)
		}
	}
	fails()
	fails()
	s := acquire(t, p)
	mustSign(t, s, pub, "key")
	s.Release()
	if n := h.fault.Calls("C_Finalize"); n != 0 {
		t.Errorf("C_Finalize was called %d times, want never", n)
	}
	if err := other.CloseSession(theirs); err != nil {
		t.Errorf("their session is gone: %v", err)
	}
	until(t, "the library is restarted once they are gone", func() bool {
		fails()
		return h.fault.Calls("C_Finalize") > 0
	})
	s = acquire(t, p)
	defer s.Release()
	mustSign(t, s, pub, "key")
}

// someoneElse is another user of the library in this process, with a session
// that is logged in because the pool is.
func someoneElse(t *testing.T, h *hsm) (*pkcs11.Ctx, pkcs11.SessionHandle) {
	t.Helper()
	other := pkcs11.New(h.Module)
	slots, err := other.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	session, err := other.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Login(session, pkcs11.CKU_USER, testhsm.PIN); !errors.Is(err, pkcs11.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN)) {
		t.Fatalf("their C_Login: %v", err)
	}
	return other, session
}
