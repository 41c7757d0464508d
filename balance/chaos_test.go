package balance_test

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/balance"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// These tests kill, stop and cut off HSMs while eight goroutines sign as fast as
// they can, and look whether anybody notices. HSMKEY_CHAOS=long does it again and
// again.

const (
	chaosOpTimeout = 2 * time.Second
	chaosSuspend   = time.Second
	chaosSigners   = 8
)

// rounds is how often a test does its worst.
func rounds(short, long int) int {
	if os.Getenv("HSMKEY_CHAOS") == "long" {
		return long
	}
	return short
}

// chaos is a fleet under load: three HSMs in an active list, two in a passive one.
type chaos struct {
	t *testing.T
	*balance.Balancer
	key             *hsmkey.HSMJWK
	servers         []*testhsm.Server
	active, passive string

	stop    context.CancelFunc
	signers sync.WaitGroup
	signed  atomic.Int64
	longest atomic.Int64 // nanoseconds
	failed  atomic.Int64
}

// newChaos makes the fleet and puts it under load; it ends with the test, which
// fails if a signature failed, was wrong, or took too long.
func newChaos(t *testing.T, change ...func(*setup)) *chaos {
	servers, active := serve(t, 0, 2)
	others, passive := serve(t, 3, 4)
	return startChaos(t, append(servers, others...), list(t, active), list(t, passive), change...)
}

func startChaos(t *testing.T, servers []*testhsm.Server, active, passive string, change ...func(*setup)) *chaos {
	t.Helper()
	s := remote(paths(active, passive))
	s.Suspend, s.Pool.OpTimeout = chaosSuspend, chaosOpTimeout
	began := time.Now()
	record := s.OnEvent
	var log []string
	var mu sync.Mutex
	s.OnEvent = func(e balance.Event) {
		mu.Lock()
		log = append(log, fmt.Sprintf("%8.3f s: %v", time.Since(began).Seconds(), e.LogValue()))
		mu.Unlock()
		record(e)
	}
	for _, c := range change {
		c(s)
	}
	c := &chaos{t: t, Balancer: s.open(t), servers: servers, active: active, passive: passive}
	c.key = find(t, c, "key")
	ctx, stop := context.WithCancel(context.Background())
	c.stop = stop
	for n := range chaosSigners {
		c.signers.Go(func() { c.sign(ctx, n) })
	}
	t.Cleanup(func() {
		c.end()
		if t.Failed() {
			mu.Lock()
			defer mu.Unlock()
			t.Logf("%+v\n%s", c.Stats(), strings.Join(log[max(0, len(log)-50):], "\n"))
		}
	})
	c.more()
	return c
}

func (c *chaos) sign(ctx context.Context, signer int) {
	for i := 0; ctx.Err() == nil; i++ {
		input := fmt.Appendf(nil, "signer-%d.signature-%d", signer, i)
		began := time.Now()
		err := sign(context.Background(), c.key, &shared.key.PublicKey, input)
		took := int64(time.Since(began))
		for old := c.longest.Load(); took > old && !c.longest.CompareAndSwap(old, took); old = c.longest.Load() {
		}
		if err != nil {
			if c.failed.Add(1) < 5 {
				c.t.Errorf("after %v: %v", time.Duration(took), err)
			}
		}
		c.signed.Add(1)
	}
}

func (c *chaos) end() {
	c.stop()
	c.signers.Wait()
	longest := time.Duration(c.longest.Load()).Round(time.Millisecond)
	c.t.Logf("%d signatures, %d failed, the longest took %v", c.signed.Load(), c.failed.Load(), longest)
	if most := chaosOpTimeout + time.Second; longest > most {
		c.t.Errorf("a caller waited %v, want %v at most", longest, most)
	}
}

// more waits for a good many signatures.
func (c *chaos) more() {
	c.t.Helper()
	want := c.signed.Load() + 50*chaosSigners
	until(c.t, "signing goes on", func() bool { return c.signed.Load() >= want || c.t.Failed() })
}

func (c *chaos) state(s *testhsm.Server) balance.EndpointStats {
	return stats(c.t, c.Balancer, s.Address)
}

func (c *chaos) suspended(s *testhsm.Server) {
	c.t.Helper()
	until(c.t, s.Address+" is suspended", func() bool { return c.state(s).State != balance.Up })
}

// used waits until sessions of a server are in use.
func (c *chaos) used(s *testhsm.Server) {
	c.t.Helper()
	until(c.t, s.Address+" is used again", func() bool {
		e := c.state(s)
		return e.State == balance.Up && e.InUse > 0
	})
}

func (c *chaos) inUse(path string) {
	c.t.Helper()
	until(c.t, path+" is in use", func() bool { return current(c.t, c.Balancer) == path })
}

func TestChaosKillOne(t *testing.T) {
	c := newChaos(t)
	for n := range rounds(2, 30) {
		victim := c.servers[n%3]
		c.used(victim)
		victim.Kill()
		c.suspended(victim)
		c.more()
		victim.Restart()
		c.used(victim)
		c.more()
	}
	c.inUse(c.active)
}

func TestChaosKillTheActiveList(t *testing.T) {
	c := newChaos(t)
	lists := []string{c.active, c.passive}
	members := [][]*testhsm.Server{c.servers[:3], c.servers[3:]}
	for n := range rounds(2, 20) {
		for _, s := range members[n%2] {
			s.Kill()
		}
		c.inUse(lists[(n+1)%2])
		c.more()
		for _, s := range members[n%2] {
			s.Restart()
		}
		c.more()
		// Who came back waits until the others fail in turn.
		c.inUse(lists[(n+1)%2])
		for _, s := range members[(n+1)%2] {
			c.used(s)
		}
	}
}

func TestChaosStopOne(t *testing.T) {
	c := newChaos(t)
	for n := range rounds(1, 10) {
		victim := c.servers[n%3]
		c.used(victim)
		failures := c.state(victim).Failures
		victim.Stop()
		c.suspended(victim)
		c.more()
		until(t, "it was visited in vain", func() bool { return c.state(victim).Failures >= failures+2 })
		victim.Continue()
		c.used(victim)
		c.more()
	}
	for _, s := range c.servers[:3] {
		until(t, "no call hangs", func() bool { return c.state(s).Orphans == 0 })
	}
}

func TestChaosCutConnections(t *testing.T) {
	servers, content := serve(t, 0, 2)
	others, passive := serve(t, 3, 4)
	p := testhsm.NewProxy(t, "127.0.0.7:0", servers[0].Address)
	content = strings.Replace(content, address(servers[0]), testhsm.ListLine(p.Address), 1)
	c := startChaos(t, append(servers, others...), list(t, content), list(t, passive))
	for range rounds(5, 100) {
		until(t, "there are connections to reset", func() bool { return p.Reset() > 0 })
		c.more()
	}
	until(t, "it is used again", func() bool {
		e := stats(t, c.Balancer, p.Address)
		return e.State == balance.Up && e.InUse > 0
	})
	c.inUse(c.active)
}

// One HSM of the active list has another key under the label, also when nobody
// else of that list is left.
func TestChaosAnotherKey(t *testing.T) {
	odd := testhsm.Remote(t, oddHSM(t, newKey(t)), "127.0.0.9:0")
	servers, content := serve(t, 0, 1)
	others, passive := serve(t, 3, 4)
	c := startChaos(t, append(servers, others...), list(t, address(odd)+content), list(t, passive))
	for range rounds(1, 10) {
		for _, s := range servers {
			s.Kill()
			c.suspended(s)
			c.more()
		}
		for _, s := range servers {
			s.Restart()
			c.used(s)
		}
		c.more()
	}
	if e := c.state(odd); e.LeftOut == 0 || e.State != balance.Up {
		t.Errorf("stats %+v, want it up, and left out", e)
	}
}

// A wrong PIN is sent once, to one HSM of all, whoever asks how often. The spies
// count what reaches the HSMs.
func TestChaosAWrongPINCostsOneAttemptInTheWholeFleet(t *testing.T) {
	var lists [2]string
	var logins []func(string) int
	for n := range 5 {
		spied := *hsm(t, n)
		module, calls := testhsm.Spy(t, &spied)
		spied.Module = module
		logins = append(logins, calls)
		lists[n/3] += address(testhsm.Remote(t, &spied, fmt.Sprintf("127.0.0.%d:0", 2+n)))
	}
	s := remote(paths(list(t, lists[0]), list(t, lists[1])))
	s.Pool.PIN = sessionpool.StaticPIN("not-the-pin")
	b := s.open(t)
	var group sync.WaitGroup
	for range chaosSigners {
		group.Go(func() {
			for range 3 {
				_, err := b.Acquire(context.Background())
				if !errors.Is(err, sessionpool.ErrPIN) || errors.Is(err, sessionpool.ErrSession) {
					t.Errorf("got %v, want ErrPIN and not ErrSession", err)
				}
				if err != nil && strings.Contains(err.Error(), "not-the-pin") {
					t.Errorf("the error contains the PIN: %v", err)
				}
			}
		})
	}
	group.Wait()
	for _, m := range b.Members() {
		if _, err := m.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrPIN) {
			t.Errorf("%s: %v, want ErrPIN", m.Name, err)
		}
	}
	total := 0
	for _, calls := range logins {
		total += calls("C_Login")
	}
	if total != 1 {
		t.Errorf("%d login attempts in the fleet, want one", total)
	}
}

func TestChaosRewriteTheList(t *testing.T) {
	events := newRecorder()
	c := newChaos(t, func(s *setup) {
		s.Refresh = time.Millisecond
		s.OnEvent = events.record
	})
	lines := make([]string, len(c.servers))
	for i, s := range c.servers {
		lines[i] = address(s)
	}
	// Each of them differs from the one before.
	lists := []string{
		lines[0] + lines[1] + lines[2], lines[2] + lines[0], lines[1], lines[3] + lines[4], lines[0] + lines[1] + lines[2] + lines[3],
	}
	garbage := []string{"", "127.0.0.2:4433\n", lines[0] + "\x00", lines[0] + lines[0], "10.0.0.1 4433\n", "# nothing\n", strings.Repeat("x", 70<<10)}
	changed, invalid := 0, 0
	for n := range rounds(200, 2000) {
		if n%3 == 2 {
			// The garbage is read time and again: once after it was written counts.
			before, _ := events.of(balance.ReloadFailed)
			writeList(t, c.active, garbage[invalid%len(garbage)])
			invalid++
			events.wait(t, balance.ReloadFailed, len(before)+1)
		} else {
			changed++
			writeList(t, c.active, lists[changed%len(lists)])
			events.wait(t, balance.Reloaded, changed)
		}
		if n%10 == 0 {
			c.more()
		}
	}
	writeList(t, c.active, "# a comment changes nothing\n"+lines[4])
	writeList(t, c.passive, lines[4])
	until(t, "the last lists are in use", func() bool {
		l := c.Stats().Lists
		return len(l[0].Endpoints) == 1 && len(l[1].Endpoints) == 1 && l[0].Endpoints[0].Name == c.servers[4].Address
	})
	until(t, "nothing drains any more", func() bool { return len(c.Stats().Draining) == 0 })
	for _, s := range c.servers[:4] {
		until(t, "no connection to "+s.Address+" is open, which no list names", func() bool { return established(t, s.Address) == 0 })
	}
	c.used(c.servers[4])
	if n := established(t, c.servers[4].Address); n == 0 {
		t.Error("no connection to the HSM in use is found: the test does not see connections")
	}
	st := c.Stats()
	if st.ReloadsInvalid < uint64(invalid) || st.ReloadsChanged < uint64(changed) || st.ReloadsSame == 0 {
		t.Errorf("stats %+v, want at least %d invalid and %d changed", st, invalid, changed)
	}
}

// established is the number of TCP connections to an address, as the kernel sees
// them.
func established(tb testing.TB, address string) int {
	tb.Helper()
	content, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		tb.Fatal(err)
	}
	to := netip.MustParseAddrPort(address)
	ip := to.Addr().As4()
	want := fmt.Sprintf("%s:%04X", strings.ToUpper(hex.EncodeToString([]byte{ip[3], ip[2], ip[1], ip[0]})), to.Port())
	n := 0
	for line := range strings.Lines(string(content)) {
		// number: local remote state …
		if f := strings.Fields(line); len(f) > 3 && f[2] == want && f[3] == "01" {
			n++
		}
	}
	return n
}
