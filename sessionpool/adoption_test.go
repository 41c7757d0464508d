package sessionpool_test

import (
	"errors"
	"testing"

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
