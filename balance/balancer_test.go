package balance_test

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/balance"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

func TestEachSessionGoesToTheNextEndpoint(t *testing.T) {
	for _, disabled := range []bool{false, true} {
		name := "session cache on"
		if disabled {
			name = "session cache off"
		}
		t.Run(name, func(t *testing.T) {
			hsm(t, 2)
			s := private(t, list(t, lines(0, 2)))
			s.Pool.DisableCache = disabled
			b := s.open(t)
			want := []string{endpoint(0), endpoint(1), endpoint(2)}
			if got := turns(t, b, 6); !slices.Equal(got, slices.Concat(want, want)) {
				t.Errorf("sessions one after the other were on %v", got)
			}
			// Whatever the load: these are held.
			var held []*sessionpool.Session
			for i := range 9 {
				s := acquire(t, b)
				held = append(held, s)
				if got := s.Token().Name(); got != want[i%3] {
					t.Errorf("held session %d is on %s, want %s", i, got, want[i%3])
				}
			}
			for _, s := range held {
				s.Release()
			}
			for n := range 3 {
				got := s.faults.of(t, n).Calls("C_OpenSession")
				// The anchor; then two one after the other, and three at once. Opening
				// the connection takes a session, too, which the cache keeps.
				want := 1 + 3
				if disabled {
					want = 1 + 1 + 2 + 3
				}
				if got != want {
					t.Errorf("HSM %d saw C_OpenSession %d times, want %d", n, got, want)
				}
			}
		})
	}
}

func TestAnEndpointThatDoesNotAnswerIsSuspended(t *testing.T) {
	hsm(t, 2)
	s := private(t, list(t, lines(0, 2)))
	b := s.open(t)
	turns(t, b, 3)
	dead := s.faults.of(t, 1)
	s.faults.kill(t, 1, pkcs11.CKR_DEVICE_REMOVED)
	for range 2 * 3 {
		use(t, b)
	}
	e := s.events.wait(t, balance.Suspended, 1)
	if e.Endpoint != endpoint(1) || !errors.Is(e.Err, pkcs11.Error(pkcs11.CKR_DEVICE_REMOVED)) {
		t.Errorf("event %+v, want HSM 1 and CKR_DEVICE_REMOVED", e)
	}
	before := dead.Calls("C_OpenSession")
	got := turns(t, b, 8)
	if slices.Contains(got, endpoint(1)) || len(slices.Compact(slices.Sorted(slices.Values(got)))) != 2 {
		t.Errorf("sessions are on %v, want both others", got)
	}
	if slices.Index(got, endpoint(0))%2 == slices.Index(got, endpoint(2))%2 || strings.Join(got[:2], "") != strings.Join(got[2:4], "") {
		t.Errorf("the share of the dead one is not divided: %v", got)
	}
	if n := dead.Calls("C_OpenSession"); n != before {
		t.Errorf("the suspended HSM was asked %d times", n-before)
	}
	st := stats(t, b, endpoint(1))
	if st.State != balance.SuspendedFor || st.Until.Before(time.Now()) || st.Failures != 1 || st.LastError == nil {
		t.Errorf("stats %+v", st)
	}
	if st := stats(t, b, endpoint(0)); st.State != balance.Up || st.Failures != 0 || st.LastError != nil {
		t.Errorf("stats of a healthy one %+v", st)
	}
}

// After its suspension an HSM that hangs is asked by one visitor, and keeps
// nobody waiting.
func TestAfterASuspensionOneVisitorTriesAndNobodyWaits(t *testing.T) {
	hsm(t, 1)
	s := private(t, list(t, lines(0, 1)))
	s.Suspend = 200 * time.Millisecond
	s.Pool.OpTimeout = time.Minute // whoever waits for the dead one is noticed
	b := s.open(t)
	turns(t, b, 2)
	dead := s.faults.of(t, 1)
	s.faults.kill(t, 1, pkcs11.CKR_DEVICE_ERROR)
	for range 2 * 2 {
		use(t, b)
	}
	s.events.wait(t, balance.Suspended, 1)
	dead.Clear()
	reached, release := dead.Hang("C_Initialize")
	defer release()
	before := dead.Calls("C_Initialize")
	var stop atomic.Bool
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for !stop.Load() {
				s, err := b.Acquire(context.Background())
				if err != nil {
					t.Error(err)
					return
				}
				if name := s.Token().Name(); name != endpoint(0) {
					t.Errorf("a session of %s, which hangs", name)
				}
				s.Release()
			}
		})
	}
	<-reached
	// Time enough for others to make the same mistake.
	until(t, "its suspension is long over", func() bool {
		return time.Since(stats(t, b, endpoint(1)).Until) > 2*s.Suspend
	})
	stop.Store(true)
	group.Wait()
	if n := dead.Calls("C_Initialize") - before; n != 1 {
		t.Errorf("%d tried, want one", n)
	}
	release()
	until(t, "the HSM is used again", func() bool { return turn(t, b) == endpoint(1) })
	s.events.wait(t, balance.Resumed, 1)
	if st := stats(t, b, endpoint(1)); st.State != balance.Up || st.LastError == nil {
		t.Errorf("stats %+v, want it up, with its last error", st)
	}
}

// What the cache holds proves nothing: the visitor opens a session.
func TestACachedSessionDoesNotEndASuspension(t *testing.T) {
	hsm(t, 1)
	s := private(t, list(t, lines(0, 1)))
	s.Suspend = 20 * time.Millisecond
	s.Pool.OpTimeout = 300 * time.Millisecond
	b := s.open(t)
	one, two, three, four := acquire(t, b), acquire(t, b), acquire(t, b), acquire(t, b)
	for _, s := range []*sessionpool.Session{one, two, three} {
		s.Release()
	}
	stuck := s.faults.of(t, 1)
	_, release := stuck.Hang("C_GetSessionInfo")
	defer release()
	if err := ping(four); !errors.Is(err, sessionpool.ErrTimeout) {
		t.Fatalf("ping: %v, want ErrTimeout", err)
	}
	four.Release()
	for _, call := range []string{"C_Initialize", "C_OpenSession"} {
		stuck.FailAll(call, pkcs11.CKR_DEVICE_ERROR)
	}
	release()
	until(t, "the call is back", func() bool { return stats(t, b, endpoint(1)).Orphans == 0 })
	until(t, "it was visited in vain", func() bool {
		if name := turn(t, b); name == endpoint(1) {
			t.Fatal("a cached session of an HSM that hangs was handed out")
		}
		return stats(t, b, endpoint(1)).Failures > 1
	})
	stuck.Clear()
	until(t, "it is used again", func() bool { return turn(t, b) == endpoint(1) })
}

// A library that hangs for ever in one call is left to itself; another instance
// of it does the work.
func TestAnInstanceThatHangsIsReplaced(t *testing.T) {
	hsm(t, 0)
	s := private(t, list(t, line(0)))
	s.Suspend = 20 * time.Millisecond
	s.Pool.OpTimeout = 300 * time.Millisecond
	b := s.open(t)
	held := acquire(t, b)
	_, release := s.faults.of(t, 0).Hang("C_GetSessionInfo")
	defer release()
	if err := ping(held); !errors.Is(err, sessionpool.ErrTimeout) {
		t.Fatalf("ping: %v, want ErrTimeout", err)
	}
	held.Release()
	until(t, "it is used again", func() bool {
		s, err := b.Acquire(context.Background())
		if err == nil {
			defer s.Release()
			err = ping(s)
		}
		return err == nil && stats(t, b, endpoint(0)).State == balance.Up
	})
	if e := stats(t, b, endpoint(0)); e.Orphans != 1 {
		t.Errorf("stats %+v, want one call that hangs", e)
	}
	release()
	until(t, "the call is back and its instance closed", func() bool {
		e := stats(t, b, endpoint(0))
		return e.Orphans == 0 && e.Connections == 1
	})
}

func TestTheNextListIsUsedUntilItFailsInTurn(t *testing.T) {
	hsm(t, 3)
	active, passive := list(t, lines(0, 1)), list(t, lines(2, 3))
	s := private(t, paths(active, passive))
	s.Suspend = 50 * time.Millisecond
	b := s.open(t)
	if got := turns(t, b, 2); !slices.Equal(got, []string{endpoint(0), endpoint(1)}) {
		t.Fatalf("sessions are on %v", got)
	}
	// become uses the fleet until a list is the current one.
	become := func(want string, endpoints ...string) {
		t.Helper()
		until(t, want+" is in use", func() bool {
			use(t, b)
			return current(t, b) == want
		})
		got := turns(t, b, 4)
		for _, name := range got {
			if !slices.Contains(endpoints, name) {
				t.Errorf("sessions are on %v, want %v only", got, endpoints)
			}
		}
	}
	s.faults.kill(t, 0, pkcs11.CKR_DEVICE_ERROR)
	until(t, "one of the active list is suspended", func() bool {
		use(t, b)
		return stats(t, b, endpoint(0)).State != balance.Up
	})
	become(active, endpoint(1))
	s.faults.kill(t, 1, pkcs11.CKR_DEVICE_ERROR)
	become(passive, endpoint(2), endpoint(3))
	e := s.events.wait(t, balance.ListSwitched, 1)
	var fleet *balance.FleetError
	if e.List != passive || !errors.As(e.Err, &fleet) || len(fleet.Causes) != 2 {
		t.Errorf("event %+v, want the passive list and two causes", e)
	}
	// The active list comes back: the current one stays.
	s.faults.of(t, 0).Clear()
	s.faults.of(t, 1).Clear()
	until(t, "their suspensions are over", func() bool {
		return time.Now().After(stats(t, b, endpoint(0)).Until) && time.Now().After(stats(t, b, endpoint(1)).Until)
	})
	become(passive, endpoint(2), endpoint(3))
	// It fails in turn, and the circle closes.
	s.faults.kill(t, 2, pkcs11.CKR_DEVICE_ERROR)
	s.faults.kill(t, 3, pkcs11.CKR_DEVICE_ERROR)
	become(active, endpoint(0), endpoint(1))
	if e := s.events.wait(t, balance.ListSwitched, 2); e.List != active {
		t.Errorf("event %+v, want the active list", e)
	}
}

func TestWhenAllAreSuspendedEachIsTriedOnceMore(t *testing.T) {
	hsm(t, 2)
	s := private(t, paths(list(t, lines(0, 1)), list(t, lines(2, 2))))
	b := s.open(t)
	codes := []uint{pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_GENERAL_ERROR}
	for n := range 3 {
		m := b.Members()[n]
		use(t, m)
		s.faults.kill(t, n, codes[n])
		use(t, m)
	}
	for range 2 { // the second time all are suspended
		_, err := b.Acquire(context.Background())
		if err == nil {
			t.Fatal("a session of dead HSMs")
		}
		for n, code := range codes {
			if !errors.Is(err, pkcs11.Error(code)) {
				t.Errorf("the error does not match the code of HSM %d: %v", n, err)
			}
		}
		var fleet *balance.FleetError
		if !errors.Is(err, sessionpool.ErrSession) || !errors.As(err, &fleet) {
			t.Fatalf("%v does not match ErrSession and *FleetError", err)
		}
		for n := range 3 {
			if len(fleet.Causes) != 3 || fleet.Causes[n].Endpoint != endpoint(n) {
				t.Fatalf("causes %+v, want one of each in the order of the lists", fleet.Causes)
			}
			if strings.Count(err.Error(), endpoint(n)) != 1 {
				t.Errorf("the error does not name %s once: %v", endpoint(n), err)
			}
		}
		if strings.Contains(err.Error(), testhsm.PIN) || strings.Contains(err.Error(), "\n") {
			t.Errorf("the error is not fit to be read: %q", err)
		}
	}
	until(t, "all are suspended", func() bool {
		events, _ := s.events.of(balance.Suspended)
		return len(events) == 3
	})
	// One comes back: it is found at once, though it is suspended for an hour.
	s.faults.of(t, 2).Clear()
	if got := turn(t, b); got != endpoint(2) {
		t.Errorf("a session of %s, want HSM 2", got)
	}
	s.events.wait(t, balance.Resumed, 1)
	if e := s.events.wait(t, balance.ListSwitched, 1); e.List != b.Stats().Lists[1].Path || current(t, b) != e.List {
		t.Errorf("event %+v, current %s", e, current(t, b))
	}
}

// All sessions but one are held for long: who waits gets that one, wherever he
// began to wait.
func TestWhoWaitsGetsTheFirstSessionThatIsFree(t *testing.T) {
	hsm(t, 1)
	s := private(t, list(t, lines(0, 1)))
	s.Pool.MaxSessions = 1
	b := s.open(t)
	long, short := acquire(t, b), acquire(t, b)
	defer long.Release()
	const callers = 20
	results := make(chan error, callers)
	for i := range callers {
		go func() {
			var opts []sessionpool.Option
			if i%5 == 0 {
				opts = append(opts, sessionpool.Encrypted()) // others need not wait for him
			}
			s, err := b.Acquire(context.Background(), opts...)
			if err == nil {
				if s.Token() == long.Token() {
					err = errors.New("a session that is in use was handed out")
				}
				s.Release()
			}
			results <- err
		}()
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if _, err := b.Acquire(ctx); !errors.Is(err, sessionpool.ErrTimeout) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waiting until a deadline: %v, want ErrTimeout and DeadlineExceeded", err)
	}
	canceled, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := b.Acquire(canceled); !errors.Is(err, context.Canceled) || errors.Is(err, sessionpool.ErrTimeout) {
		t.Errorf("cancelled: %v, want context.Canceled", err)
	}
	short.Release()
	for range callers {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	if e := stats(t, b, endpoint(0)); e.Failures != 0 || e.State != balance.Up {
		t.Errorf("a busy HSM counts as dead: %+v", e)
	}
}

func TestCloseWithEverythingInUseAndInDespair(t *testing.T) {
	hsm(t, 1)
	s := private(t, list(t, lines(0, 1)))
	s.Pool.MaxSessions = 1
	b, err := balance.New(s.Config)
	if err != nil {
		t.Fatal(err)
	}
	held := []*sessionpool.Session{acquire(t, b), acquire(t, b)}
	waiting := make(chan error, 4)
	for range 4 {
		go func() {
			_, err := b.Acquire(context.Background())
			waiting <- err
		}()
	}
	expired, cancel := context.WithCancel(context.Background())
	cancel()
	if err := b.Close(expired); !errors.Is(err, context.Canceled) {
		t.Errorf("closing while sessions are in use: %v, want context.Canceled", err)
	}
	for range 4 {
		if err := <-waiting; !errors.Is(err, sessionpool.ErrClosed) {
			t.Errorf("who waited for a session: %v, want ErrClosed", err)
		}
	}
	if _, err := b.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrClosed) {
		t.Errorf("after Close: %v, want ErrClosed", err)
	}
	for _, s := range held {
		if err := ping(s); err != nil {
			t.Errorf("a session in use: %v", err)
		}
		s.Release()
	}
	closeBalancer(t, b)
	closeBalancer(t, b) // twice is safe
	if st := b.Stats(); len(st.Lists) != 0 || len(st.Draining) != 0 {
		t.Errorf("stats %+v, want nothing", st)
	}
	for n := range 2 {
		if open := s.faults.of(t, n).Sessions(); open != 0 {
			t.Errorf("HSM %d has %d sessions open", n, open)
		}
	}
	if b.Members() != nil {
		t.Error("a closed balancer has members")
	}
}

func TestAMemberIsASourceOfItsOwn(t *testing.T) {
	hsm(t, 1)
	active, passive := list(t, line(0)), list(t, lines(0, 1))
	s := private(t, paths(active, passive))
	b := s.open(t)
	members := b.Members()
	if len(members) != 2 || members[0].Name != endpoint(0) || members[0].List != active || members[1].List != passive {
		t.Fatalf("members %+v, want HSM 0 of the active list and HSM 1 of the passive one", members)
	}
	for n, m := range members {
		if got := turns(t, m, 2); got[0] != endpoint(n) || got[1] != endpoint(n) {
			t.Errorf("sessions of member %d are on %v", n, got)
		}
		if m.State() != balance.Up {
			t.Errorf("state %v", m.State())
		}
	}
	s.faults.kill(t, 0, pkcs11.CKR_DEVICE_ERROR)
	use(t, members[0])
	if _, err := members[0].Acquire(context.Background()); !errors.Is(err, pkcs11.Error(pkcs11.CKR_DEVICE_ERROR)) {
		t.Errorf("a dead member: %v, want CKR_DEVICE_ERROR", err)
	}
	if members[0].State() != balance.SuspendedFor {
		t.Errorf("state %v, want suspended", members[0].State())
	}
	s.faults.of(t, 0).Clear()
	if got := turn(t, members[0]); got != endpoint(0) {
		t.Errorf("a suspended member is not to be had: %s", got)
	}
}

// Where there is room for one session, a cached one of another kind makes room.
func TestASessionThatNobodyUsesIsInNobodysWay(t *testing.T) {
	hsm(t, 0)
	s := private(t, list(t, line(0)))
	s.Pool.MaxSessions = 1
	b := s.open(t)
	for name, source := range map[string]sessionpool.Source{"the balancer": b, "a member": b.Members()[0]} {
		for _, other := range []sessionpool.Option{sessionpool.ReadWrite(), sessionpool.Public()} {
			acquire(t, source, other).Release()
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			session, err := source.Acquire(ctx)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			session.Release()
		}
	}
}

func TestAFleetWithoutItsLibraryTellsSo(t *testing.T) {
	s := private(t, list(t, "pkcs11:token=x?module-path=/nowhere/lib.so\n"))
	b := s.open(t)
	_, err := b.Acquire(context.Background())
	if !errors.Is(err, sessionpool.ErrConfig) || !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "/nowhere/lib.so") {
		t.Errorf("got %v, want ErrConfig, ErrNotExist and the path", err)
	}
}
