package balance_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"go.uber.org/goleak"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/balance"
	"github.com/hsmkey/hsmkey/internal/fault"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		if shared.dir != "" {
			_ = os.RemoveAll(shared.dir)
		}
		os.Exit(code)
	}))
}

// shared are HSMs that every test may use, since making one takes its time: each
// with the same keys "key" (P-256) and "ed" (Ed25519), and a conf file "hsm-N.conf".
var shared struct {
	dir  string
	hsms []*testhsm.HSM
	key  *ecdsa.PrivateKey
	ed   ed25519.PrivateKey
}

// hsm returns the nth HSM with the keys that all have, from 0.
func hsm(tb testing.TB, n int) *testhsm.HSM {
	tb.Helper()
	if shared.dir == "" {
		dir, err := os.MkdirTemp("", "balance-")
		if err != nil {
			tb.Fatal(err)
		}
		shared.dir, shared.key = dir, newKey(tb)
		if _, shared.ed, err = ed25519.GenerateKey(rand.Reader); err != nil {
			tb.Fatal(err)
		}
	}
	for i := len(shared.hsms); i <= n; i++ {
		h := emptyHSM(tb, filepath.Join(shared.dir, fmt.Sprint(i)), fmt.Sprintf("token-%d", i))
		testhsm.Import(tb, h, shared.key, "key", "01")
		testhsm.Import(tb, h, shared.ed, "ed", "02")
		if err := os.Symlink(h.Conf, filepath.Join(shared.dir, host(i)+".conf")); err != nil {
			tb.Fatal(err)
		}
		shared.hsms = append(shared.hsms, h)
	}
	return shared.hsms[n]
}

func emptyHSM(tb testing.TB, dir, label string) *testhsm.HSM {
	tb.Helper()
	if err := os.Mkdir(dir, 0o700); err != nil {
		tb.Fatal(err)
	}
	h, err := testhsm.Create(dir, label)
	if err != nil {
		tb.Fatal(err)
	}
	return h
}

func newKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

// host is what lists call the nth HSM, as an endpoint of RemoteModule; endpoint
// is its name in errors and statistics.
func host(n int) string     { return fmt.Sprintf("hsm-%d", n) }
func line(n int) string     { return host(n) + " 1" }
func endpoint(n int) string { return host(n) + ":1" }

// lines are the endpoints from first to last.
func lines(first, last int) string {
	var all strings.Builder
	for n := first; n <= last; n++ {
		all.WriteString(line(n) + "\n")
	}
	return all.String()
}

// writeList makes or replaces a balance list.
func writeList(tb testing.TB, path, content string) {
	tb.Helper()
	fresh := path + ".new"
	if err := os.WriteFile(fresh, []byte(content), 0o600); err != nil {
		tb.Fatal(err)
	}
	if err := os.Rename(fresh, path); err != nil {
		tb.Fatal(err)
	}
}

// list writes a new balance list and returns its path.
func list(tb testing.TB, content string) string {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), "list")
	writeList(tb, path, content)
	return path
}

func paths(all ...string) string { return strings.Join(all, string(filepath.ListSeparator)) }

// setup is a configuration of a fleet, with what the test sees of it.
type setup struct {
	balance.Config
	events *recorder
	faults *faults
}

// private is a fleet of private instances of SoftHSM2, which stands in for the
// library of a vendor that finds its HSM by the environment. Each has a fault
// injector of its own.
func private(tb testing.TB, lists string) *setup {
	tb.Helper()
	s := &setup{events: newRecorder(), faults: newFaults()}
	hsm(tb, 0)
	s.Config = balance.Config{
		Lists: lists, Remote: balance.RemoteModule,
		RemoteEnv: "SOFTHSM2_CONF=" + shared.dir + "/{host}.conf",
		Suspend:   time.Hour,
		Pool: sessionpool.Config{
			Module: testhsm.ModulePath(), PIN: sessionpool.StaticPIN(testhsm.PIN),
			Wrap: s.faults.wrap,
		},
		OnEvent: s.events.record,
	}
	return s
}

// remote is a fleet of p11-kit servers.
func remote(lists string) *setup {
	s := &setup{events: newRecorder()}
	s.Config = balance.Config{
		Lists: lists, Suspend: time.Hour,
		Pool:    sessionpool.Config{PIN: sessionpool.StaticPIN(testhsm.PIN)},
		OnEvent: s.events.record,
	}
	return s
}

// serve publishes HSMs from the first to the last on 127.0.0.2 and so on, and
// returns the servers with their lines in lists.
func serve(tb testing.TB, first, last int) (servers []*testhsm.Server, content string) {
	tb.Helper()
	for n := first; n <= last; n++ {
		s := testhsm.Remote(tb, hsm(tb, n), fmt.Sprintf("127.0.0.%d:0", 2+n))
		servers = append(servers, s)
		content += address(s)
	}
	return servers, content
}

// address is the line of a server in a list.
func address(s *testhsm.Server) string { return testhsm.ListLine(s.Address) }

// open makes a balancer that is closed, in order, when the test ends.
func (s *setup) open(tb testing.TB) *balance.Balancer {
	tb.Helper()
	b, err := balance.New(s.Config)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { closeBalancer(tb, b) })
	return b
}

func closeBalancer(tb testing.TB, b *balance.Balancer) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := b.Close(ctx); err != nil {
		tb.Errorf("closing the balancer: %v", err)
	}
}

func acquire(tb testing.TB, src sessionpool.Source, opts ...sessionpool.Option) *sessionpool.Session {
	tb.Helper()
	s, err := src.Acquire(context.Background(), opts...)
	if err != nil {
		tb.Fatalf("acquiring a session: %v", err)
	}
	return s
}

// turn acquires a session, releases it and returns the name of its endpoint.
func turn(tb testing.TB, src sessionpool.Source) string {
	tb.Helper()
	s := acquire(tb, src)
	defer s.Release()
	return s.Token().Name()
}

// turns is turn n times.
func turns(tb testing.TB, src sessionpool.Source, n int) []string {
	tb.Helper()
	var names []string
	for range n {
		names = append(names, turn(tb, src))
	}
	return names
}

// use uses a session, well or not: so it is found out whether an endpoint works.
func use(tb testing.TB, src sessionpool.Source) {
	tb.Helper()
	s := acquire(tb, src)
	defer s.Release()
	_ = ping(s)
}

func ping(s *sessionpool.Session) error {
	return s.Do(context.Background(), func(m sessionpool.Module, h pkcs11.SessionHandle) error {
		_, err := m.GetSessionInfo(h)
		return err
	})
}

// find looks up the key that all HSMs have.
func find(tb testing.TB, src sessionpool.Source, label string) *hsmkey.HSMJWK {
	tb.Helper()
	key, err := hsmkey.FromHSM(context.Background(), src, hsmkey.Query{Label: label})
	if err != nil {
		tb.Fatalf("finding the key: %v", err)
	}
	return key
}

// sign makes a JWS signature and verifies it.
func sign(ctx context.Context, key *hsmkey.HSMJWK, public crypto.PublicKey, input []byte) error {
	signature, err := key.SignJWS(ctx, key.Algorithms()[0], input)
	if err != nil {
		return err
	}
	if !verifies(public, input, signature) {
		return errWrong
	}
	return nil
}

var errWrong = errors.New("the signature does not verify")

func verifies(public crypto.PublicKey, input, signature []byte) bool {
	switch public := public.(type) {
	case *ecdsa.PublicKey:
		digest := sha256.Sum256(input)
		return len(signature) == 64 && ecdsa.Verify(public, digest[:],
			new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:]))
	case ed25519.PublicKey:
		return ed25519.Verify(public, input, signature)
	}
	return false
}

func mustSign(tb testing.TB, key *hsmkey.HSMJWK, public crypto.PublicKey) {
	tb.Helper()
	if err := sign(context.Background(), key, public, []byte("header.payload")); err != nil {
		tb.Fatalf("signing: %v", err)
	}
}

// stats finds one endpoint.
func stats(tb testing.TB, b *balance.Balancer, name string) balance.EndpointStats {
	tb.Helper()
	for _, l := range b.Stats().Lists {
		for _, e := range l.Endpoints {
			if e.Name == name {
				return e
			}
		}
	}
	tb.Fatalf("no endpoint is called %s: %+v", name, b.Stats())
	return balance.EndpointStats{}
}

// current is the path of the list in use.
func current(tb testing.TB, b *balance.Balancer) string {
	tb.Helper()
	for _, l := range b.Stats().Lists {
		if l.Current {
			return l.Path
		}
	}
	tb.Fatal("no list is in use")
	return ""
}

// recorder keeps events, and lets a test wait for them.
type recorder struct {
	mu     sync.Mutex
	events []balance.Event
	more   chan struct{}
}

func newRecorder() *recorder { return &recorder{more: make(chan struct{})} }

func (r *recorder) record(e balance.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
	close(r.more)
	r.more = make(chan struct{})
}

// of returns the events of a kind so far.
func (r *recorder) of(kind balance.EventKind) (found []balance.Event, more <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.events {
		if e.Kind == kind {
			found = append(found, e)
		}
	}
	return found, r.more
}

// wait waits for the nth event of a kind, from 1, and returns it.
func (r *recorder) wait(tb testing.TB, kind balance.EventKind, n int) balance.Event {
	tb.Helper()
	deadline := time.After(time.Minute)
	for {
		found, more := r.of(kind)
		if len(found) >= n {
			return found[n-1]
		}
		select {
		case <-more:
		case <-deadline:
			tb.Fatalf("%d of %d events %q came", len(found), n, kind)
		}
	}
}

// faults are the injectors of private instances, by the label of their token.
type faults struct {
	mu      sync.Mutex
	byLabel map[string]*fault.Injector
	logins  map[string]int
}

func newFaults() *faults {
	return &faults{byLabel: map[string]*fault.Injector{}, logins: map[string]int{}}
}

func (f *faults) wrap(m sessionpool.Module) sessionpool.Module {
	i := fault.New()
	return i.Wrap(&labelled{m, f, i})
}

// of returns the injector of the nth HSM, once it was connected to.
func (f *faults) of(tb testing.TB, n int) *fault.Injector {
	tb.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	i := f.byLabel[fmt.Sprintf("token-%d", n)]
	if i == nil {
		tb.Fatalf("HSM %d was not connected to", n)
	}
	return i
}

// kill makes everything on the nth HSM answer a code, until Clear.
func (f *faults) kill(tb testing.TB, n int, code uint) {
	tb.Helper()
	i := f.of(tb, n)
	i.CloseSessions()
	for _, call := range []string{"C_Initialize", "C_GetSlotList", "C_OpenSession", "C_GetSessionInfo", "C_Sign"} {
		i.FailAll(call, code)
	}
}

// labelled learns the label of the token that an injector stands in front of.
type labelled struct {
	sessionpool.Module
	faults   *faults
	injector *fault.Injector
}

func (l *labelled) GetTokenInfo(slot uint) (pkcs11.TokenInfo, error) {
	info, err := l.Module.GetTokenInfo(slot)
	if err == nil && info.Flags&pkcs11.CKF_TOKEN_INITIALIZED != 0 {
		l.faults.mu.Lock()
		defer l.faults.mu.Unlock()
		l.faults.byLabel[strings.TrimRight(info.Label, " \x00")] = l.injector
	}
	return info, err
}

// until waits until a condition holds that no event tells of.
func until(tb testing.TB, what string, holds func() bool) {
	tb.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	deadline := time.After(time.Minute)
	for !holds() {
		select {
		case <-tick.C:
		case <-deadline:
			tb.Fatalf("it never came true that %s", what)
		}
	}
}

// tokenVerifies checks a compact JWS by the key that all HSMs have.
func tokenVerifies(token string) bool {
	at := strings.LastIndexByte(token, '.')
	if at < 0 {
		return false
	}
	signature, err := base64.RawURLEncoding.DecodeString(token[at+1:])
	return err == nil && verifies(&shared.key.PublicKey, []byte(token[:at]), signature)
}

// loginCounter counts C_Login on all instances.
type loginCounter struct{ n atomic.Int64 }

func (c *loginCounter) wrap(m sessionpool.Module) sessionpool.Module { return &countingLogins{m, c} }

type countingLogins struct {
	sessionpool.Module
	counter *loginCounter
}

func (m *countingLogins) Login(h pkcs11.SessionHandle, userType uint, pin string) error {
	m.counter.n.Add(1)
	return m.Module.Login(h, userType, pin)
}
