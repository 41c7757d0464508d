package balance_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hsmkey/hsmkey/balance"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// reloading is a fleet of private instances that looks at its list all the time.
func reloading(t *testing.T, content string) (*setup, *balance.Balancer) {
	hsm(t, 2)
	s := private(t, list(t, content))
	s.Refresh = time.Millisecond
	return s, s.open(t)
}

func TestTheSameListAgainChangesNothing(t *testing.T) {
	s, b := reloading(t, lines(0, 1))
	turns(t, b, 4)
	writeList(t, s.Lists, "# comments and blanks\n\n\t"+line(0)+"   # make no difference\r\n"+line(1))
	same := b.Stats().ReloadsSame
	until(t, "the list was read again", func() bool { return b.Stats().ReloadsSame >= same+3 })
	turns(t, b, 4)
	st := b.Stats()
	if st.ReloadsChanged != 0 || st.ReloadsInvalid != 0 {
		t.Errorf("stats %+v", st)
	}
	for n := range 2 {
		if closed := s.faults.of(t, n).Calls("C_CloseSession"); closed != 0 {
			t.Errorf("HSM %d: %d sessions were closed", n, closed)
		}
	}
}

func TestAnInvalidListChangesNothingAndIsReported(t *testing.T) {
	s, b := reloading(t, lines(0, 1))
	turns(t, b, 4)
	for _, test := range []struct {
		name   string
		spoil  func()
		reason error
	}{
		{"garbage", func() { writeList(t, s.Lists, "hsm-0:1\n") }, nil},
		{"nothing", func() { writeList(t, s.Lists, "") }, nil},
		{"gone", func() { _ = os.Remove(s.Lists) }, fs.ErrNotExist},
		{"a directory", func() { _ = os.Remove(s.Lists); _ = os.Mkdir(s.Lists, 0o700) }, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			events, _ := s.events.of(balance.ReloadFailed)
			test.spoil()
			until(t, "it is reported", func() bool {
				now, _ := s.events.of(balance.ReloadFailed)
				if len(now) <= len(events)+1 {
					return false
				}
				var bad *balance.ListError
				err := now[len(now)-1].Err
				if !errors.As(err, &bad) || bad.File != s.Lists || !errors.Is(err, sessionpool.ErrConfig) || test.reason != nil && !errors.Is(err, test.reason) {
					t.Fatalf("event error %v, want a *ListError about the file and %v", err, test.reason)
				}
				return true
			})
			if got := turns(t, b, 4); got[0] == got[1] || !slices.Equal(got[:2], got[2:]) {
				t.Errorf("sessions are on %v, want both in turn", got)
			}
			if st := b.Stats(); st.ReloadsInvalid == 0 || st.ReloadsChanged != 0 {
				t.Errorf("stats %+v", st)
			}
		})
	}
	for n := range 2 {
		if closed := s.faults.of(t, n).Calls("C_CloseSession"); closed != 0 {
			t.Errorf("HSM %d: %d sessions were closed", n, closed)
		}
	}
	// It comes back as it was: nothing happened.
	_ = os.Remove(s.Lists)
	writeList(t, s.Lists, lines(0, 1))
	same := b.Stats().ReloadsSame
	until(t, "the list was read again", func() bool { return b.Stats().ReloadsSame > same })
	if st := b.Stats(); st.ReloadsChanged != 0 {
		t.Errorf("stats %+v", st)
	}
}

// Sessions of old lists finish what they do, are closed physically, and new ones
// are on the new lists.
func TestAChangedListDrainsAndSwitches(t *testing.T) {
	s, b := reloading(t, lines(0, 1))
	key := find(t, b, "key")
	for range 4 {
		mustSign(t, key, &shared.key.PublicKey)
	}
	inUse := map[string]*sessionpool.Session{}
	for range 2 {
		s := acquire(t, b)
		inUse[s.Token().Name()] = s
	}
	writeList(t, s.Lists, lines(1, 2))
	s.events.wait(t, balance.Reloaded, 1)
	for range 8 {
		mustSign(t, key, &shared.key.PublicKey)
	}
	got := turns(t, b, 4)
	if slices.Contains(got, endpoint(0)) || !slices.Contains(got, endpoint(1)) || !slices.Contains(got, endpoint(2)) {
		t.Errorf("new sessions are on %v, want HSM 1 and 2", got)
	}
	st := b.Stats()
	if len(st.Draining) != 1 || st.Draining[0].Name != endpoint(0) || st.Draining[0].State != balance.Draining || st.Draining[0].InUse != 1 {
		t.Errorf("draining %+v, want HSM 0 with one session in use", st.Draining)
	}
	for name, session := range inUse {
		if err := sign(context.Background(), key.In(session), &shared.key.PublicKey, []byte("a.b")); err != nil {
			t.Errorf("the session in use on %s: %v", name, err)
		}
	}
	old := s.faults.of(t, 1)
	before := old.Calls("C_CloseSession")
	inUse[endpoint(1)].Release()
	if n := old.Calls("C_CloseSession") - before; n != 1 {
		t.Errorf("releasing a session of the old list closed %d sessions, want this one", n)
	}
	inUse[endpoint(0)].Release()
	until(t, "nothing drains any more", func() bool { return len(b.Stats().Draining) == 0 })
	if f := s.faults.of(t, 0); f.Sessions() != 0 || f.Calls("C_Finalize") != 1 {
		t.Errorf("HSM 0 has %d sessions, was finalised %d times", f.Sessions(), f.Calls("C_Finalize"))
	}
	// It is listed again.
	writeList(t, s.Lists, line(0))
	s.events.wait(t, balance.Reloaded, 2)
	if got := turns(t, b, 2); got[0] != endpoint(0) || got[1] != endpoint(0) {
		t.Errorf("sessions are on %v", got)
	}
	mustSign(t, key, &shared.key.PublicKey)
	until(t, "nothing drains any more", func() bool { return len(b.Stats().Draining) == 0 })
	if st := b.Stats(); st.ReloadsChanged != 2 || st.ReloadsInvalid != 0 {
		t.Errorf("stats %+v", st)
	}
}

// Whoever waits while the lists change is served by the new ones.
func TestWhoWaitsIsServedByTheNewList(t *testing.T) {
	hsm(t, 1)
	s := private(t, list(t, line(0)))
	s.Refresh, s.Pool.MaxSessions = time.Millisecond, 1
	b := s.open(t)
	held := acquire(t, b)
	served := make(chan string, 3)
	for range cap(served) {
		go func() {
			s, err := b.Acquire(context.Background())
			if err != nil {
				served <- err.Error()
				return
			}
			defer s.Release()
			served <- s.Token().Name()
		}()
	}
	writeList(t, s.Lists, line(1))
	for range cap(served) {
		if got := <-served; got != endpoint(1) {
			t.Errorf("served by %s, want HSM 1", got)
		}
	}
	held.Release()
}

// An HSM that is taken off the list while it hangs keeps nobody.
func TestAChangedListDoesNotWaitForAnHSMThatHangs(t *testing.T) {
	servers, content := serve(t, 0, 1)
	s := remote(list(t, content))
	s.Refresh, s.Pool.OpTimeout = time.Millisecond, time.Second
	b := s.open(t)
	key := find(t, b, "key")
	for range 8 {
		mustSign(t, key, &shared.key.PublicKey)
	}
	servers[0].Stop()
	writeList(t, s.Lists, address(servers[1]))
	s.events.wait(t, balance.Reloaded, 1)
	for range 8 {
		mustSign(t, key, &shared.key.PublicKey)
	}
	writeList(t, s.Lists, content) // before anybody knows what became of it
	s.events.wait(t, balance.Reloaded, 2)
	writeList(t, s.Lists, address(servers[1]))
	s.events.wait(t, balance.Reloaded, 3)
	until(t, "nothing drains any more", func() bool { return len(b.Stats().Draining) == 0 })
	if n := established(t, servers[0].Address); n != 0 {
		t.Errorf("%d connections are open to the HSM that hangs", n)
	}
	servers[0].Continue()
}

// An HSM that is taken off the list while a call hangs in its library is forgotten
// when that comes back: it is a new one if it is listed again.
func TestAnEndpointIsForgottenWhenItsLastCallComesBack(t *testing.T) {
	hsm(t, 1)
	s := private(t, list(t, lines(0, 1)))
	back := make(chan struct{}, 1)
	s.Refresh, s.Pool.OpTimeout = time.Millisecond, 300*time.Millisecond
	s.Pool.OnEvent = func(e sessionpool.Event) {
		if e.Kind == sessionpool.OrphanReturned {
			back <- struct{}{}
		}
	}
	b := s.open(t)
	held := acquire(t, b.Members()[0])
	_, release := s.faults.of(t, 0).Hang("C_GetSessionInfo")
	defer release()
	if err := ping(held); !errors.Is(err, sessionpool.ErrTimeout) {
		t.Fatalf("ping: %v, want ErrTimeout", err)
	}
	held.Release()
	writeList(t, s.Lists, line(1))
	s.events.wait(t, balance.Reloaded, 1)
	until(t, "its connection is closed, as far as that goes", func() bool {
		stacks := make([]byte, 1<<20) // of tasks, too
		return !strings.Contains(string(stacks[:runtime.Stack(stacks, true)]), "created by sync.(*WaitGroup).Go ")
	})
	release()
	until(t, "the call is back", func() bool { return len(back) > 0 })
	writeList(t, s.Lists, lines(0, 1))
	s.events.wait(t, balance.Reloaded, 2)
	if e := stats(t, b, endpoint(0)); e.Failures != 0 || e.LastError != nil {
		t.Errorf("stats %+v, want those of a new endpoint", e)
	}
}

// A library that was loaded stays in the process: endpoints that come and go must
// not make it grow.
func TestEndpointsThatComeAndGoLeaveNothingBehind(t *testing.T) {
	_, one := serve(t, 0, 0)
	_, other := serve(t, 1, 1)
	s := remote(list(t, one))
	s.Refresh = time.Millisecond
	b := s.open(t)
	use(t, b)
	before := copies(t)
	for n := range 20 {
		writeList(t, s.Lists, []string{other, one}[n%2])
		s.events.wait(t, balance.Reloaded, n+1)
		until(t, "the old connection is closed", func() bool { return len(b.Stats().Draining) == 0 })
		use(t, b)
	}
	if after := copies(t); after > before+1 {
		t.Errorf("%d copies of the library after 20 changes, %d before", after, before)
	}
}

// copies is the number of private instances of libraries in this process.
func copies(tb testing.TB) int {
	tb.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		tb.Fatal(err)
	}
	paths := map[string]bool{}
	for line := range strings.Lines(string(maps)) {
		if at := strings.Index(line, "/"); at >= 0 && strings.Contains(line, "hsmkey-module-") {
			paths[line[at:]] = true
		}
	}
	return len(paths)
}
