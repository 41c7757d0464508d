package balance_test

import (
	"context"
	"errors"
	"strings"
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

// All HSMs behind one switch hang at once: nobody waits for one after the other.
func TestHSMsThatHangTogetherAreSuspendedTogether(t *testing.T) {
	hsm(t, 1)
	s := private(t, list(t, lines(0, 1)))
	s.Pool.OpTimeout = 2 * time.Second
	b := s.open(t)
	done := make(chan struct{})
	var releases []func()
	for n, m := range b.Members() {
		session := acquire(t, m)
		reached, release := s.faults.of(t, n).Hang("C_GetSessionInfo")
		releases = append(releases, release)
		go func() {
			defer session.Release()
			if err := ping(session); !errors.Is(err, sessionpool.ErrTimeout) {
				t.Errorf("%v, want ErrTimeout", err)
			}
			done <- struct{}{}
		}()
		<-reached
	}
	<-done
	together := 0
	for n := range 2 {
		e := stats(t, b, endpoint(n))
		if e.State != balance.SuspendedFor || !errors.Is(e.LastError, sessionpool.ErrTimeout) {
			t.Errorf("%s is %s because of %v, want it suspended", e.Name, e.State, e.LastError)
		} else if strings.Contains(e.LastError.Error(), "another HSM's") {
			together++
		}
	}
	if together != 1 {
		t.Errorf("%d were suspended because another one hangs, want one", together)
	}
	<-done
	for _, release := range releases {
		release()
	}
}
