package sessionpool_test

import (
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

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
