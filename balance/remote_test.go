package balance_test

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/balance"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/jws"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// The caller does nothing but name the lists.
func TestAProgramIsBalancedWithoutAChangeInItsCode(t *testing.T) {
	hsm(t, 2)
	_, content := serve(t, 0, 2)
	for kind, env := range map[string]map[string]string{
		"p11-kit": {"HSM_LOAD_BALANCE_LIST": list(t, content)},
		"module": {
			"HSM_LOAD_BALANCE_LIST": list(t, lines(0, 2)), "HSM_REMOTE": "module",
			"HSM_REMOTE_ENV": "SOFTHSM2_CONF=" + shared.dir + "/{host}.conf", "HSM_MODULE": testhsm.ModulePath(),
		},
		"module, without cache": {
			"HSM_LOAD_BALANCE_LIST": list(t, lines(0, 2)), "HSM_REMOTE": "module",
			"HSM_REMOTE_ENV": "SOFTHSM2_CONF=" + shared.dir + "/{host}.conf", "HSM_MODULE": testhsm.ModulePath(),
			"HSM_DISABLE_SESSION_CACHE": "1",
		},
	} {
		t.Run(kind, func(t *testing.T) {
			for name, value := range env {
				t.Setenv(name, value)
			}
			t.Setenv("HSM_PIN", testhsm.PIN)
			config, err := hsmkey.FromEnv()
			if err != nil {
				t.Fatal(err)
			}
			signTokens(t, config)
		})
	}
}

// signTokens is a program.
func signTokens(t *testing.T, config hsmkey.Config) {
	ctx := context.Background()
	h, err := hsmkey.Open(ctx, config)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := h.Close(ctx); err != nil {
			t.Error(err)
		}
	}()
	key, err := h.Key(ctx, hsmkey.Query{Label: "key"})
	if err != nil {
		t.Fatal(err)
	}
	signer, err := jws.NewSigner(key, jws.Options{Type: "JWT"})
	if err != nil {
		t.Fatal(err)
	}
	endpoints := func() []balance.EndpointStats { return h.Balancer().Stats().Lists[0].Endpoints }
	// An HSM that is being connected to is not waited for while others have a session.
	until(t, "there are sessions on each endpoint", func() bool {
		token, err := signer.SignClaims(ctx, map[string]any{"sub": "alice"})
		if err != nil {
			t.Fatal(err)
		}
		if !tokenVerifies(token) {
			t.Errorf("the token does not verify: %s", token)
		}
		return !slices.ContainsFunc(endpoints(), func(e balance.EndpointStats) bool { return e.Opened == 0 })
	})
	for _, e := range endpoints() {
		if e.State != balance.Up || e.Failures != 0 {
			t.Errorf("endpoint %+v, want no failure", e)
		}
	}
}

func TestAnEndpointHasAsManyConnectionsAsSessionsInUse(t *testing.T) {
	_, content := serve(t, 0, 1)
	s := remote(list(t, content))
	s.Pool.MaxSessions = 3
	b := s.open(t)
	var held []*sessionpool.Session
	for range 6 {
		held = append(held, acquire(t, b))
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := b.Acquire(ctx); !errors.Is(err, sessionpool.ErrTimeout) {
		t.Errorf("beyond MaxSessions: %v, want ErrTimeout", err)
	}
	for _, e := range b.Stats().Lists[0].Endpoints {
		if e.Connections != 3 || e.InUse != 3 || e.Failures != 0 {
			t.Errorf("endpoint %+v, want 3 connections in use", e)
		}
	}
	// None of them waits for another one.
	var group sync.WaitGroup
	for _, s := range held {
		group.Go(func() {
			if err := ping(s); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	for _, s := range held {
		s.Release()
	}
	turns(t, b, 10)
	if e := b.Stats().Lists[0].Endpoints[0]; e.Connections != 3 || e.Opened == 0 {
		t.Errorf("endpoint %+v, want the same 3 connections", e)
	}
}

func TestASignatureMovesOnWhenItsHSMDies(t *testing.T) {
	for _, disabled := range []bool{false, true} {
		t.Run(fmt.Sprintf("without session cache %v", disabled), func(t *testing.T) { moveOn(t, disabled) })
	}
}

func moveOn(t *testing.T, disableCache bool) {
	servers, content := serve(t, 0, 1)
	s := remote(list(t, content))
	s.Suspend = 100 * time.Millisecond
	s.Pool.DisableCache = disableCache
	b := s.open(t)
	key := find(t, b, "key")
	for range 4 {
		mustSign(t, key, &shared.key.PublicKey)
	}
	servers[0].Kill()
	for range 8 {
		mustSign(t, key, &shared.key.PublicKey)
	}
	e := s.events.wait(t, balance.Suspended, 1)
	if want := servers[0].Address; e.Endpoint != want || !strings.Contains(e.Err.Error(), "connection refused") {
		t.Errorf("event %+v, want %s and that the connection was refused", e, want)
	}
	servers[0].Restart()
	until(t, "it is used again", func() bool {
		mustSign(t, key, &shared.key.PublicKey)
		return stats(t, b, servers[0].Address).State == balance.Up
	})
	servers[1].Kill()
	for range 8 {
		mustSign(t, key, &shared.key.PublicKey)
	}
}

func TestAnHSMThatHangsIsLeftAloneAndTakenBack(t *testing.T) {
	servers, content := serve(t, 0, 1)
	s := remote(list(t, content))
	s.Suspend = 100 * time.Millisecond
	s.Pool.OpTimeout = 500 * time.Millisecond
	b := s.open(t)
	key := find(t, b, "key")
	for range 4 {
		mustSign(t, key, &shared.key.PublicKey)
	}
	servers[0].Stop()
	until(t, "it is suspended, and was visited in vain", func() bool {
		mustSign(t, key, &shared.key.PublicKey)
		return stats(t, b, servers[0].Address).Failures > 1
	})
	if e := s.events.wait(t, balance.Suspended, 1); !errors.Is(e.Err, sessionpool.ErrTimeout) {
		t.Errorf("event %+v, want ErrTimeout", e)
	}
	servers[0].Continue()
	until(t, "it is used again", func() bool {
		mustSign(t, key, &shared.key.PublicKey)
		return stats(t, b, servers[0].Address).State == balance.Up
	})
	until(t, "no call hangs", func() bool { return stats(t, b, servers[0].Address).Orphans == 0 })
}

func TestCloseWithEveryHSMDead(t *testing.T) {
	servers, content := serve(t, 0, 2)
	s := remote(list(t, content))
	s.Pool.OpTimeout = 500 * time.Millisecond
	b := s.open(t)
	for range 6 {
		use(t, b)
	}
	held := acquire(t, b)
	servers[0].Kill()
	servers[1].Stop()
	servers[2].Stop()
	_ = ping(held)
	held.Release()
	// What hangs is cut off: the test's end finds no goroutine.
	closeBalancer(t, b)
	if _, err := b.Acquire(context.Background()); !errors.Is(err, sessionpool.ErrClosed) {
		t.Errorf("got %v, want ErrClosed", err)
	}
	servers[1].Continue()
	servers[2].Continue()
}

func TestMutualTLS(t *testing.T) {
	files, others := testhsm.NewTLSFiles(t), testhsm.NewTLSFiles(t)
	server := testhsm.RemoteTLS(t, hsm(t, 0), "127.0.0.2:0", files)
	plain := testhsm.Remote(t, hsm(t, 1), "127.0.0.3:0")
	s := remote(list(t, address(server)+address(plain)))
	s.TLSCA, s.TLSCert, s.TLSKey = files.CA, files.ClientCert, files.ClientKey
	s.Pool.OpTimeout = 2 * time.Second
	b := s.open(t)
	key := find(t, b, "key")
	for range 4 {
		mustSign(t, key, &shared.key.PublicKey)
	}
	// One that does not speak TLS is not spoken to.
	if e := s.events.wait(t, balance.Suspended, 1); e.Endpoint != plain.Address || !strings.Contains(e.Err.Error(), "TLS") {
		t.Errorf("event %+v, want that %s does not speak TLS", e, plain.Address)
	}
	encrypted := acquire(t, b, sessionpool.Encrypted())
	if got := encrypted.Token().Name(); got != server.Address {
		t.Errorf("an encrypted session on %s, want %s", got, server.Address)
	}
	encrypted.Release()

	s = remote(list(t, address(server)))
	s.TLSCA, s.TLSCert, s.TLSKey = files.CA, others.ClientCert, others.ClientKey
	_, err := s.open(t).Acquire(context.Background())
	if !errors.Is(err, sessionpool.ErrSession) || !strings.Contains(err.Error(), "unknown certificate authority") {
		t.Errorf("a client of another authority: %v, want ErrSession and the reason", err)
	}
	s = remote(list(t, address(server)))
	s.TLSCA, s.TLSCert, s.TLSKey = others.CA, files.ClientCert, files.ClientKey
	if _, err = s.open(t).Acquire(context.Background()); !errors.Is(err, sessionpool.ErrSession) || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("a server of another authority: %v, want ErrSession and the reason", err)
	}
}

func TestEncryptedSessionsAvoidWaysThatAreNot(t *testing.T) {
	in := testhsm.New(t, "inside")
	testhsm.Import(t, in, hsmKey(t), "key", "01")
	_, content := serve(t, 0, 0)
	s := remote(list(t, content+uri(in, "inside")))
	b := s.open(t)
	for range 4 {
		s := acquire(t, b, sessionpool.Encrypted())
		if got := s.Token().Name(); !strings.HasPrefix(got, "pkcs11:") {
			t.Errorf("an encrypted session on %s", got)
		}
		s.Release()
	}
	if got := turns(t, b, 2); got[0] == got[1] {
		t.Errorf("other sessions are on %v, want both", got)
	}
	for _, e := range b.Stats().Lists[0].Endpoints {
		if e.Failures != 0 {
			t.Errorf("it counts as a failure: %+v", e)
		}
	}
	s = remote(list(t, content))
	if _, err := s.open(t).Acquire(context.Background(), sessionpool.Encrypted()); !errors.Is(err, sessionpool.ErrUnsupported) || errors.Is(err, sessionpool.ErrSession) {
		t.Errorf("with plaintext only: %v, want ErrUnsupported and not ErrSession", err)
	}
}

// hsmKey is the key that all HSMs have.
func hsmKey(tb testing.TB) crypto.Signer {
	tb.Helper()
	hsm(tb, 0)
	return shared.key
}

// uri is the line of a token in this process.
func uri(h *testhsm.HSM, token string) string {
	return fmt.Sprintf("pkcs11:token=%s?module-path=%s\n", token, h.Module)
}

// p11-kit does not forward EdDSA.
func TestAnEndpointWithoutTheMechanismLeavesItToOthers(t *testing.T) {
	in := testhsm.New(t, "inside")
	_, content := serve(t, 0, 0)
	testhsm.Import(t, in, shared.ed, "ed", "02")
	public := shared.ed.Public()

	s := remote(list(t, content))
	b := s.open(t)
	key := find(t, b, "ed")
	_, err := key.SignJWS(context.Background(), hsmkey.EdDSA, []byte("a.b"))
	if !errors.Is(err, hsmkey.ErrUnsupported) || errors.Is(err, hsmkey.ErrSession) {
		t.Errorf("got %v, want ErrUnsupported and not ErrSession", err)
	}
	endpoint := b.Members()[0].Name
	for _, want := range []string{"CKM_EDDSA", endpoint} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not name %s: %v", want, err)
		}
	}
	if e := stats(t, b, endpoint); e.State != balance.Up || e.LeftOut == 0 {
		t.Errorf("stats %+v, want it up, and left out", e)
	}

	s = remote(list(t, content+uri(in, "inside")))
	b = s.open(t)
	key = find(t, b, "ed")
	for range 20 {
		mustSign(t, key, public)
	}
	e := s.events.wait(t, balance.LeftOut, 1)
	if e.Endpoint != endpoint || !errors.Is(e.Err, hsmkey.ErrUnsupported) || !strings.Contains(e.Err.Error(), "CKM_EDDSA") {
		t.Errorf("event %+v, want the endpoint and the mechanism", e)
	}
	if found, _ := s.events.of(balance.LeftOut); len(found) != 1 {
		t.Errorf("%d events for 20 signatures: the endpoint is asked each time", len(found))
	}
	// The same endpoint signs with other keys.
	ec, before := find(t, b, "key"), stats(t, b, endpoint)
	_ = before
	mustSign(t, ec, &shared.key.PublicKey)
}

func TestAPrivateInstanceForEachAddress(t *testing.T) {
	hsm(t, 2)
	s := private(t, list(t, lines(0, 2)))
	b := s.open(t)
	key := find(t, b, "key")
	for range 6 {
		mustSign(t, key, &shared.key.PublicKey)
	}
	seen := map[string]string{}
	until(t, "each was used", func() bool {
		s := acquire(t, b, sessionpool.Encrypted()) // as far as anybody can tell
		defer s.Release()
		seen[s.Token().Name()] = s.Token().Info().Label
		return len(seen) == 3
	})
	for n := range 3 {
		if got, want := seen[endpoint(n)], hsm(t, n).Labels[0]; got != want {
			t.Errorf("%s leads to token %q, want %q", endpoint(n), got, want)
		}
	}
	// One dies alone, and comes back alone.
	s.faults.kill(t, 1, pkcs11.CKR_DEVICE_ERROR)
	for range 6 {
		mustSign(t, key, &shared.key.PublicKey)
	}
	if n := s.faults.of(t, 0).Calls("C_Finalize") + s.faults.of(t, 2).Calls("C_Finalize"); n != 0 {
		t.Errorf("the others were finalised %d times", n)
	}
}

// The address is checked as soon as it is known, and nothing is sent.
func TestPlaintextBeyondLoopbackIsRefusedAtOnce(t *testing.T) {
	for address, refused := range map[string]bool{
		"10.0.20.1 4433": true, "2001:db8::1 4433": true, "::ffff:10.0.0.1 4433": true, "0.0.0.0 4433": true,
		"127.0.0.2 4433": false, "::1 4433": false, "::ffff:127.0.0.1 4433": false,
		"hsm.example.com 4433": false, // nobody knows yet where it leads
	} {
		path := list(t, "# two\n127.0.0.9 4433\n  "+address+"\n")
		s := remote(path)
		b, err := balance.New(s.Config)
		if b != nil {
			closeBalancer(t, b)
		}
		var bad *balance.ListError
		switch {
		case !refused && err != nil:
			t.Errorf("%s: %v", address, err)
		case refused && (!errors.As(err, &bad) || !errors.Is(err, sessionpool.ErrConfig)):
			t.Errorf("%s: %v, want a *ListError and ErrConfig", address, err)
		case refused && (bad.File != path || bad.Line != 3 || bad.Column != 3 || !strings.Contains(err.Error(), "HSM_REMOTE_PLAINTEXT") || !strings.Contains(err.Error(), "HSM_TLS_CA")):
			t.Errorf("%s: %v, want the file, line and column, and what helps", address, err)
		}
		s.Plaintext = true
		if b, err = balance.New(s.Config); err != nil {
			t.Errorf("%s, allowed: %v", address, err)
			continue
		}
		closeBalancer(t, b)
	}
}

func TestANameThatLeadsElsewhereIsRefusedWithoutTLS(t *testing.T) {
	s := remote(list(t, "localhost 4433\n"))
	server := testhsm.Remote(t, hsm(t, 0), "127.0.0.1:0")
	_, port, _ := strings.Cut(server.Address, ":")
	s.Lists = list(t, "localhost "+port+"\n")
	key := find(t, s.open(t), "key")
	mustSign(t, key, &shared.key.PublicKey)
}

func TestAnEndpointWithAPINOfItsOwn(t *testing.T) {
	in := testhsm.New(t, "one", "two")
	dir := t.TempDir()
	pin := filepath.Join(dir, "pin")
	writeList(t, pin, testhsm.PIN+"\n")
	s := remote(list(t, fmt.Sprintf("pkcs11:token=one?module-path=%s&pin-source=file:%s\npkcs11:token=two?module-path=%s&pin-value=%s\n",
		in.Module, pin, in.Module, testhsm.PIN)))
	s.Pool.PIN = nil
	b := s.open(t)
	got := turns(t, b, 4)
	if got[0] == got[1] || !slices.Equal(got[:2], got[2:]) {
		t.Errorf("sessions are on %v, want both in turn", got)
	}
	for _, name := range got {
		if strings.Contains(name, testhsm.PIN) {
			t.Errorf("the name of an endpoint contains its PIN: %s", name)
		}
	}
}

func TestASessionForWhatEverybodyMayKnowNeedsNoLogin(t *testing.T) {
	_, content := serve(t, 0, 1)
	s := remote(list(t, content))
	var logins loginCounter
	s.Pool.Wrap, s.Pool.PIN = logins.wrap, sessionpool.StaticPIN("not-"+testhsm.PIN)
	b := s.open(t)
	members := b.Members()
	for name, source := range map[string]sessionpool.Source{"the balancer": b, "a member": members[0]} {
		// The second one is on a connection of its own.
		first, second := acquire(t, source, sessionpool.Public()), acquire(t, source, sessionpool.Public())
		for _, session := range []*sessionpool.Session{first, second} {
			if err := ping(session); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			session.Release()
		}
	}
	if n := logins.n.Load(); n != 0 {
		t.Fatalf("%d logins", n)
	}
	if _, err := members[0].Acquire(context.Background()); !errors.Is(err, sessionpool.ErrPIN) || logins.n.Load() != 1 {
		t.Errorf("a usual session: %v after %d logins, want ErrPIN after one", err, logins.n.Load())
	}
	acquire(t, members[0], sessionpool.Public()).Release()
}

// That one can be had does not show that the login works.
func TestASessionWithoutLoginEndsNoSuspension(t *testing.T) {
	servers, content := serve(t, 0, 0)
	b := remote(list(t, content)).open(t)
	m := b.Members()[0]
	servers[0].Kill()
	if _, err := m.Acquire(context.Background(), sessionpool.Public()); !errors.Is(err, sessionpool.ErrSession) {
		t.Errorf("a dead HSM: %v, want ErrSession", err)
	}
	if e := stats(t, b, servers[0].Address); e.State != balance.SuspendedFor || e.Connections != 0 {
		t.Fatalf("stats %+v, want it suspended, without connections", e)
	}
	servers[0].Restart()
	acquire(t, m, sessionpool.Public()).Release()
	if m.State() != balance.SuspendedFor {
		t.Errorf("state %s, want suspended", m.State())
	}
	acquire(t, m).Release()
	if m.State() != balance.Up {
		t.Errorf("state %s after a login, want up", m.State())
	}
}
