package sessionpool_test

import (
	"errors"
	"testing"
	"time"

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
