package testhsm_test

import (
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/internal/testhsm"
)

func TestTheSpyCountsWhatReachesTheModule(outer *testing.T) {
	// Twice in one process: the second spy must not inherit the first one's log,
	// although the first one is still loaded, as a cached module is.
	for _, logins := range []int{3, 1} {
		outer.Run("", func(t *testing.T) {
			h := testhsm.New(t)
			module, calls := testhsm.Spy(t, h)
			if n := calls("C_Initialize"); n != 0 {
				t.Errorf("before anything was loaded: %d calls", n)
			}
			outer.Cleanup(pkcs11.New(module).Destroy)
			p := load(t, module)
			session := login(t, p)
			for range logins - 1 {
				if err := p.Logout(session); err != nil {
					t.Fatal(err)
				}
				if err := p.Login(session, pkcs11.CKU_USER, testhsm.PIN); err != nil {
					t.Fatal(err)
				}
			}
			for function, want := range map[string]int{
				"C_Login":       logins,
				"C_Logout":      logins - 1,
				"C_OpenSession": 1,
				"C_Initialize":  1,
				"C_Sign":        0,
			} {
				if got := calls(function); got != want {
					t.Errorf("%s: %d calls, want %d", function, got, want)
				}
			}
		})
	}
}

func TestTheSpyCountsFailedCallsToo(t *testing.T) {
	h := testhsm.New(t)
	module, calls := testhsm.Spy(t, h)
	p := load(t, module)
	slots, err := p.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	session, err := p.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Login(session, pkcs11.CKU_USER, "wrong"); err == nil {
		t.Fatal("a wrong PIN was accepted")
	}
	if n := calls("C_Login"); n != 1 {
		t.Errorf("C_Login: %d calls, want 1", n)
	}
}
