package balance_test

import (
	"context"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/balance"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// oneBusyOneDead is a fleet of two HSMs with a session each: that of the second is
// in use until the test ends, the first does not answer.
func oneBusyOneDead(t *testing.T) (*setup, *balance.Balancer) {
	t.Helper()
	hsm(t, 1)
	s := private(t, list(t, lines(0, 1)))
	s.Pool.MaxSessions, s.Suspend = 1, 100*time.Millisecond
	b := s.open(t)
	turns(t, b, 2)
	m := b.Members()
	s.faults.kill(t, 0, pkcs11.CKR_DEVICE_ERROR)
	use(t, m[0])
	held := acquire(t, m[1])
	t.Cleanup(held.Release)
	return s, b
}

// served fails the test unless a session is had in time.
func served(t *testing.T, b *balance.Balancer) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	s, err := b.Acquire(ctx)
	if err != nil {
		t.Errorf("%v; %+v", err, b.Stats())
		return
	}
	s.Release()
}

// Nobody but those who wait for a session is there to notice.
func TestASuspensionEndsForThoseWhoWait(t *testing.T) {
	s, b := oneBusyOneDead(t)
	if _, err := b.Members()[0].Acquire(context.Background()); err == nil {
		t.Fatal("a dead HSM gives a session")
	}
	s.faults.of(t, 0).Clear()
	served(t, b)
}

// The first of them has asked the HSM already, in vain.
func TestThoseWhoWaitAreServedByAnHSMThatComesBack(t *testing.T) {
	s, b := oneBusyOneDead(t)
	done := make(chan struct{})
	const waiters = 3
	for range waiters {
		go func() {
			served(t, b)
			done <- struct{}{}
		}()
	}
	s.events.wait(t, balance.Suspended, 1)
	s.faults.of(t, 0).Clear()
	for range waiters {
		<-done
	}
}

// What one caller does not want is good enough for all others.
func TestTheListStaysInUseWhenOneCallerAvoidsItsHSMs(t *testing.T) {
	hsm(t, 1)
	active, passive := list(t, line(0)), list(t, line(1))
	s := private(t, paths(active, passive))
	b := s.open(t)
	m := b.Members()
	use(t, m[0])
	use(t, m[1])
	s.faults.kill(t, 1, pkcs11.CKR_DEVICE_ERROR)
	use(t, m[1])
	if _, err := m[1].Acquire(context.Background()); err == nil {
		t.Fatal("a dead HSM gives a session")
	}
	s.faults.of(t, 1).Clear()
	one := acquire(t, b)
	one.Release()
	acquire(t, b, sessionpool.Avoid(one.Token())).Release()
	if current(t, b) != active {
		e, _ := s.events.of(balance.ListSwitched)
		t.Errorf("the passive list is in use, though HSM 0 is %s: %+v", stats(t, b, endpoint(0)).State, e)
	}
}
