package sessionpool_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/hsmkey/hsmkey/sessionpool"
)

func TestALibraryThatWasLeftToOthersIsTheirs(t *testing.T) {
	h := newHSM(t)
	p, err := sessionpool.New(h.cfg)
	if err != nil {
		t.Fatal(err)
	}
	acquire(t, p).Release()
	other, _ := someoneElse(t, h)
	closePool(t, p)
	// They begin anew, and have no session yet.
	if err := errors.Join(other.Finalize(), other.Initialize()); err != nil {
		t.Fatal(err)
	}
	p, err = sessionpool.New(h.cfg)
	if err != nil {
		t.Fatal(err)
	}
	acquire(t, p).Release()
	closePool(t, p)
	if n := h.fault.Calls("C_Finalize"); n != 0 {
		t.Errorf("C_Finalize was called %d times, want never", n)
	}
	if err := other.Finalize(); err != nil {
		t.Errorf("their C_Finalize: %v", err)
	}
}

func TestALibraryIsNotFinalisedUnderAnOrphanOfAnEarlierPool(t *testing.T) {
	h := newHSM(t)
	h.cfg.OpTimeout = 200 * time.Millisecond
	p, err := sessionpool.New(h.cfg)
	if err != nil {
		t.Fatal(err)
	}
	s := acquire(t, p)
	_, release := h.fault.Hang("C_GetSessionInfo")
	defer release()
	if err := ping(s); !errors.Is(err, sessionpool.ErrTimeout) {
		t.Errorf("got %v, want ErrTimeout", err)
	}
	s.Release()
	if err := p.Close(context.Background()); !errors.Is(err, sessionpool.ErrTimeout) {
		t.Errorf("closing under a call that hangs: %v, want ErrTimeout", err)
	}
	next, err := sessionpool.New(h.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := next.Close(context.Background()); !errors.Is(err, sessionpool.ErrTimeout) {
		t.Errorf("closing the next pool: %v, want ErrTimeout", err)
	}
	if n := h.fault.Calls("C_Finalize"); n != 0 {
		t.Errorf("C_Finalize was called %d times under a call", n)
	}
	release()
	until(t, "the orphan is back", func() bool { return p.Stats().Orphans == 0 })
	closePool(t, h.pool(t)) // finalises it
}
