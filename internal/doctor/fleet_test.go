package doctor_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/balance"
	"github.com/hsmkey/hsmkey/internal/doctor"
	"github.com/hsmkey/hsmkey/internal/fault"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// fleetOf is a configuration with a balance list of tokens, and their URIs.
func fleetOf(t *testing.T, test *testhsm.HSM) (hsmkey.Config, []string) {
	t.Helper()
	var uris []string
	for _, label := range test.Labels {
		uris = append(uris, "pkcs11:token="+label+"?module-path="+test.Module)
	}
	c := config(test)
	c.Pool.TokenLabel = ""
	c.Balance.Lists = write(t, 0o600, uris...)
	return c, uris
}

// on opens one token of several.
func on(t *testing.T, test *testhsm.HSM, label string) *hsmkey.HSM {
	t.Helper()
	c := config(test)
	c.Pool.TokenLabel = label
	return open(t, c)
}

// checksOf are those of one endpoint, by a part of its name.
func checksOf(t *testing.T, r *doctor.Report, part string) []doctor.Check {
	t.Helper()
	return endpoint(t, r, part).Checks
}

func endpoint(t *testing.T, r *doctor.Report, part string) *doctor.Endpoint {
	t.Helper()
	at := slices.IndexFunc(r.Endpoints, func(e *doctor.Endpoint) bool { return strings.Contains(e.Name, part) })
	if at < 0 {
		t.Fatalf("there is no endpoint %q", part)
	}
	return r.Endpoints[at]
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// put imports a key into one token.
func put(t *testing.T, h *hsmkey.HSM, label string, key any, id ...byte) {
	t.Helper()
	if _, err := h.Import(t.Context(), label, key, id); err != nil {
		t.Fatal(err)
	}
}

// putEverywhere imports one key into every token.
func putEverywhere(t *testing.T, test *testhsm.HSM, label string) {
	t.Helper()
	key := newKey(t)
	for _, token := range test.Labels {
		put(t, on(t, test, token), label, key)
	}
}

const working = "token, PIN state, login, mechanisms, session limit, round trip, "

func TestEveryEndpointOfEveryListIsExamined(t *testing.T) {
	test := testhsm.New(t, "north", "east", "west")
	c, uris := fleetOf(t, test)
	c.Balance.Lists = write(t, 0o600, uris[:2]...) + ":" + write(t, 0o600, uris[2])
	putEverywhere(t, test, "demo")
	r := run(t, c, withKey("demo"))
	wantNames(t, r.Checks, "lists, PIN source")
	if r.Status != doctor.OK || len(r.Endpoints) != 3 || len(r.Keys) != 0 {
		t.Fatalf("%+v", r)
	}
	lists := strings.Split(c.Balance.Lists, ":")
	for i, e := range r.Endpoints {
		wantNames(t, e.Checks, working+"key, signature")
		if e.Name != uris[i] || e.List != lists[i/2] || e.Token != test.Labels[i] || e.Login != doctor.Verified || e.Key != doctor.Usable {
			t.Errorf("%+v", e)
		}
	}
	r = run(t, c)
	for _, e := range r.Endpoints {
		wantNames(t, e.Checks, working+"keys, signature")
		if e.UsableKeys != 1 || e.SignedKeys != 1 {
			t.Errorf("%+v", e)
		}
	}
	if len(r.Keys) != 1 || r.Keys[0].Label != "demo" || r.Keys[0].Status != doctor.OK || r.Keys[0].KeyID == "" || r.Keys[0].Type != hsmkey.P256 {
		t.Errorf("%+v", r.Keys)
	}
}

func TestTheKeyMustBeOnEveryEndpointAndTheSame(t *testing.T) {
	test := testhsm.New(t, "north", "east", "west", "south")
	c, _ := fleetOf(t, test)
	right := newKey(t)
	put(t, on(t, test, "north"), "demo", newKey(t)) // in the minority, though the first
	put(t, on(t, test, "east"), "demo", right)
	put(t, on(t, test, "south"), "demo", right)
	r := run(t, c, withKey("demo"))
	wantNames(t, checksOf(t, r, "north"), working+"key, signature, same key=fail")
	wantNames(t, checksOf(t, r, "east"), working+"key, signature")
	wantNames(t, checksOf(t, r, "west"), working+"key=fail")
	f := r.Failures()
	if len(f) != 2 || !errors.Is(f[0].Err, hsmkey.ErrKeyMismatch) || !strings.Contains(f[0].Detail, "token=east") || !errors.Is(f[1].Err, hsmkey.ErrKeyNotFound) {
		t.Errorf("%v", f)
	}
	if endpoint(t, r, "north").Key != doctor.Different || endpoint(t, r, "west").Key != doctor.Missing {
		t.Errorf("%+v", r.Endpoints)
	}
}

func TestWithoutAKeyInMindAllAreCompared(t *testing.T) {
	test := testhsm.New(t, "north", "east", "west")
	c, uris := fleetOf(t, test)
	north, east, west := on(t, test, "north"), on(t, test, "east"), on(t, test, "west")
	same, secret := newKey(t), []byte(strings.Repeat("s", 32))
	for i, h := range []*hsmkey.HSM{north, east, west} {
		put(t, h, "everywhere", same)
		put(t, h, "secret", secret, 9)
		put(t, h, "two kids", []byte(strings.Repeat("k", 32)), byte(20+i))
		put(t, h, "two ids", newKeyOnce(t), byte(30+i))
	}
	key := newKey(t)
	put(t, north, "missing", key)
	put(t, east, "missing", key)
	put(t, north, "different", key, 40)
	put(t, east, "different", newKey(t), 40)
	put(t, west, "different", key, 40)
	put(t, north, "other type", key, 50)
	put(t, east, "other type", secret, 51)
	put(t, west, "other type", key, 52)
	for id := range byte(2) {
		testhsm.GenerateEC(t, &testhsm.HSM{Module: test.Module, Conf: test.Conf, Labels: []string{"west"}}, "twin", fmt.Sprintf("6%d", id))
	}
	aes(t, north, "wrapping")
	aes(t, north, "odd here")
	put(t, west, "odd here", key, 70)

	r := run(t, c)
	type verdict struct {
		status                        doctor.Status
		missing, different, ambiguous []string
	}
	want := map[string]verdict{
		"everywhere": {status: doctor.OK},
		"secret":     {status: doctor.OK},
		"two ids":    {status: doctor.OK},
		"two kids":   {status: doctor.Warn},
		"missing":    {status: doctor.Fail, missing: uris[2:]},
		"different":  {status: doctor.Fail, different: uris[1:2]},
		"other type": {status: doctor.Fail, different: uris[1:2]},
		"twin":       {status: doctor.Fail, missing: uris[:2], ambiguous: uris[2:]},
		"wrapping":   {status: doctor.OK},
		"odd here":   {status: doctor.Fail, different: uris[:1], missing: uris[1:2]},
	}
	for _, k := range r.Keys {
		w, known := want[k.Label]
		if !known || k.Status != w.status || !slices.Equal(k.Missing, w.missing) || !slices.Equal(k.Different, w.different) || !slices.Equal(k.Ambiguous, w.ambiguous) {
			t.Errorf("%s: %+v, want %+v", k.Name(), k, w)
		}
		if k.Status != doctor.OK && k.Hint == "" || k.Detail == "" {
			t.Errorf("%s has no hint, or no detail: %+v", k.Name(), k)
		}
		var sentinel error // of the worst
		switch {
		case len(k.Different) > 0:
			sentinel = hsmkey.ErrKeyMismatch
		case len(k.Ambiguous) > 0:
			sentinel = hsmkey.ErrAmbiguous
		case len(k.Missing) > 0:
			sentinel = hsmkey.ErrKeyNotFound
		}
		if !errors.Is(k.Err, sentinel) {
			t.Errorf("%s: %v, want %v", k.Name(), k.Err, sentinel)
		}
		delete(want, k.Label)
	}
	if len(want) > 0 {
		t.Errorf("nothing is said of %v", want)
	}
	if r.Status != doctor.Fail || len(r.Failures()) != 5 {
		t.Errorf("%s, %v", r.Status, r.Failures())
	}
}

// newKeyOnce is the same key for the whole test binary.
var newKeyOnce = func() func(*testing.T) *ecdsa.PrivateKey {
	var once sync.Once
	var key *ecdsa.PrivateKey
	return func(t *testing.T) *ecdsa.PrivateKey {
		once.Do(func() { key = newKey(t) })
		return key
	}
}()

// aes puts a key onto a token that signs nothing.
func aes(t *testing.T, h *hsmkey.HSM, label string) {
	t.Helper()
	s, err := h.Source().Acquire(t.Context(), sessionpool.ReadWrite())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Release()
	if err := s.Do(t.Context(), func(m sessionpool.Module, session pkcs11.SessionHandle) error {
		_, err := m.CreateObject(session, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
			pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
			pkcs11.NewAttribute(pkcs11.CKA_VALUE, make([]byte, 16)),
		})
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

func TestAListThatCannotBeReadFails(t *testing.T) {
	test := testhsm.New(t)
	c := config(test)
	for name, path := range map[string]string{"missing": "/nowhere/list", "wrong": write(t, 0o600, "127.0.0.1:4433")} {
		c.Balance.Lists = path
		r := run(t, c)
		wantNames(t, all(r), "lists=fail")
		if f := r.Failures(); !errors.Is(f[0].Err, hsmkey.ErrConfig) || !errors.As(f[0].Err, new(*balance.ListError)) {
			t.Errorf("%s: %v", name, f)
		}
	}
}

func TestAWrongPINCostsTheFleetOneAttempt(t *testing.T) {
	test := testhsm.New(t, "north", "east", "west")
	spy, calls := testhsm.Spy(t, test)
	test.Module = spy
	c, _ := fleetOf(t, test)
	c.Pool.PIN = sessionpool.StaticPIN("not-" + testhsm.PIN)
	r := run(t, c)
	for _, f := range r.Failures() {
		if f.Name != "login" || !errors.Is(f.Err, hsmkey.ErrPIN) {
			t.Errorf("%v", f)
		}
	}
	if len(r.Failures()) != 3 {
		t.Errorf("%d failures, want each endpoint's", len(r.Failures()))
	}
	for i, e := range r.Endpoints { // what needs no login is found out all the same
		wantNames(t, e.Checks, "token, PIN state, login=fail, mechanisms, session limit, round trip")
		if e.Token != test.Labels[i] || e.RoundTrip <= 0 || len(e.Algorithms) == 0 || e.Sessions == 0 {
			t.Errorf("%+v", e)
		}
	}
	if n := calls("C_Login"); n != 1 {
		t.Errorf("%d calls of C_Login, want 1", n)
	}
}

func TestEachEndpointMayHaveAPINOfItsOwn(t *testing.T) {
	test := testhsm.New(t, "north", "east", "west")
	c, uris := fleetOf(t, test)
	putEverywhere(t, test, "demo")
	c.Pool.PIN = nil
	good, exposed := write(t, 0o600, testhsm.PIN), write(t, 0o644, testhsm.PIN)
	c.Balance.Lists = write(t, 0o600, uris[0]+"&pin-source=file:"+good, uris[1]+"&pin-source=file:"+exposed, uris[2]+"&pin-value="+testhsm.PIN)
	missing := func(o *doctor.Options) { o.PIN = doctor.PINOrigin{File: "/nowhere/pin"} } // needed by nobody
	r := run(t, c, missing)
	wantNames(t, r.Checks, "lists")
	wantNames(t, checksOf(t, r, "north"), "PIN source, "+working+"keys, signature")
	wantNames(t, checksOf(t, r, "east"), "PIN source=warn, "+working+"keys, signature")
	wantNames(t, checksOf(t, r, "west"), "PIN source, "+working+"keys, signature")

	c.Balance.Lists = write(t, 0o644, uris[2]+"&pin-value="+testhsm.PIN)
	wantNames(t, checksOf(t, run(t, c), "west"), "PIN source=warn, "+working+"keys, signature")
}

func TestDeadHSMsDoNotHideTheOthers(t *testing.T) {
	var lines []string
	var servers []*testhsm.Server
	for i := range 4 {
		h := testhsm.NewDetached(t)
		testhsm.GenerateEC(t, h, "demo", "01")
		s := testhsm.Remote(t, h, fmt.Sprintf("127.0.0.%d:0", i+2))
		servers = append(servers, s)
		host, port, err := net.SplitHostPort(s.Address)
		if err != nil {
			t.Fatal(err)
		}
		lines = append(lines, host+" "+port)
	}
	c := hsmkey.Config{Pool: sessionpool.Config{PIN: sessionpool.StaticPIN(testhsm.PIN), OpTimeout: 5 * time.Second}}
	c.Balance.Lists = write(t, 0o600, lines...)
	servers[0].Stop()
	servers[1].Stop()
	servers[2].Kill()
	r := run(t, c)
	for i, dead := range []bool{true, true, true, false} {
		e := endpoint(t, r, servers[i].Address)
		if e.Transport != doctor.Plaintext {
			t.Errorf("%s: %s", e.Name, e.Transport)
		}
		if !dead {
			wantNames(t, e.Checks, working+"keys, signature")
			continue
		}
		wantNames(t, e.Checks, "connection=fail")
		if got := check(t, e.Checks, "connection"); !errors.Is(got.Err, hsmkey.ErrTimeout) && !errors.Is(got.Err, hsmkey.ErrSession) || errors.Is(got.Err, hsmkey.ErrConfig) {
			t.Errorf("%s: %v", e.Name, got.Err)
		}
	}
	servers[0].Continue()
	servers[1].Continue()
}

func TestATokenThatIsNotThereIsAMistakeAndLacksNoKey(t *testing.T) {
	test := testhsm.New(t, "north", "east")
	_, uris := fleetOf(t, test)
	c := config(test)
	c.Balance.Lists = write(t, 0o600, uris[0], strings.ReplaceAll(uris[1], "east", "elsewhere"))
	put(t, on(t, test, "north"), "demo", newKey(t))
	r := run(t, c)
	wantNames(t, checksOf(t, r, "elsewhere"), "connection=fail")
	if f := r.Failures(); len(f) != 1 || !errors.Is(f[0].Err, hsmkey.ErrConfig) || errors.Is(f[0].Err, hsmkey.ErrSession) {
		t.Errorf("%v", f)
	}
	if len(r.Keys) != 1 || r.Keys[0].Status != doctor.OK {
		t.Errorf("%+v", r.Keys)
	}
}

func TestEndpointsAreExaminedAtTheSameTime(t *testing.T) {
	test := testhsm.New(t, "north", "east", "west")
	c, _ := fleetOf(t, test)
	putEverywhere(t, test, "demo")
	// Nobody gets an answer until all have asked.
	var asked sync.WaitGroup
	asked.Add(len(test.Labels))
	c.Pool.Wrap = func(m sessionpool.Module) sessionpool.Module { return &barrier{Module: m, all: &asked} }
	if r := run(t, c); r.Status != doctor.OK {
		t.Errorf("%s", names(all(r)))
	}
}

type barrier struct {
	sessionpool.Module
	all *sync.WaitGroup
}

func (m *barrier) GetInfo() (pkcs11.Info, error) {
	m.all.Done()
	m.all.Wait()
	return m.Module.GetInfo()
}

func TestTheTransportIsTold(t *testing.T) {
	files := testhsm.NewTLSFiles(t)
	detached := testhsm.NewDetached(t)
	testhsm.GenerateEC(t, detached, "demo", "01")
	server := testhsm.RemoteTLS(t, detached, "127.0.0.2:0", files)
	host, port, err := net.SplitHostPort(server.Address)
	if err != nil {
		t.Fatal(err)
	}
	c := hsmkey.Config{Pool: sessionpool.Config{PIN: sessionpool.StaticPIN(testhsm.PIN), OpTimeout: slow}}
	c.Balance.Lists = write(t, 0o600, host+" "+port)
	c.Balance.TLSCA, c.Balance.TLSCert, c.Balance.TLSKey = files.CA, files.ClientCert, files.ClientKey
	r := run(t, c)
	wantNames(t, all(r), "lists, PIN source, "+working+"keys, signature")
	if e := r.Endpoints[0]; e.Transport != doctor.TLS || e.Sessions != sessionpool.DefaultMaxSessions || slices.Contains(e.Algorithms, hsmkey.EdDSA) {
		t.Errorf("%+v", e)
	}

	// In the clear, to a name that may be anywhere.
	c.Balance = balance.Config{Lists: write(t, 0o600, "hsm.invalid 4433"), Plaintext: true}
	r = run(t, c)
	wantNames(t, r.Endpoints[0].Checks, "transport=warn, connection=fail")
	if f := r.Failures(); !errors.Is(f[0].Err, hsmkey.ErrSession) {
		t.Errorf("%v", f)
	}

	test := testhsm.New(t)
	testhsm.GenerateEC(t, test, "demo", "01")
	c = config(test)
	c.Balance = balance.Config{Lists: write(t, 0o600, "10.0.20.1 4433"), Remote: balance.RemoteModule, RemoteEnv: "VENDOR_HOST={host}"}
	r = run(t, c)
	wantNames(t, all(r), "lists, PIN source, "+working+"keys, signature")
	if e := r.Endpoints[0]; e.Transport != doctor.Vendor {
		t.Errorf("%+v", e)
	}
}

func TestAnInterruptEndsTheExamination(t *testing.T) {
	test := testhsm.New(t)
	c := config(test)
	injector, end := fault.New(), make(chan struct{})
	c.Pool.Wrap = func(m sessionpool.Module) sessionpool.Module { return &oneLogin{injector.Wrap(m), end} }
	reached, release := injector.Hang("C_Login")
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-reached; cancel() }()
	r := doctor.Run(ctx, doctor.Options{Config: c})
	if f := r.Failures(); len(f) == 0 || !errors.Is(f[0].Err, context.Canceled) {
		t.Errorf("%v", f)
	}
	release()
	<-end // it writes to the token's directory
	// The library is finalised by whoever uses it next.
	open(t, config(test))
}

// oneLogin tells when C_Login comes back.
type oneLogin struct {
	sessionpool.Module
	end chan struct{}
}

func (m *oneLogin) Login(session pkcs11.SessionHandle, user uint, pin string) error {
	defer close(m.end)
	return m.Module.Login(session, user, pin)
}

func TestAReportIsJSON(t *testing.T) {
	test := testhsm.New(t, "north", "east")
	c, uris := fleetOf(t, test)
	put(t, on(t, test, "north"), "demo", newKey(t))
	text, err := json.Marshal(run(t, c))
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Status    string
		Checks    []struct{ Name, Status, Detail string }
		Endpoints []struct {
			Endpoint, List, Status, Transport, Login string
			Algorithms                               []string
			RoundTrip                                float64 `json:"round_trip_ms"`
			Usable                                   int     `json:"usable_keys"`
			Signed                                   int     `json:"signed_keys"`
		}
		Keys []struct {
			Label, Status, Kid string
			Missing            []string
		}
	}
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	if got.Status != "fail" || len(got.Checks) != 2 || len(got.Endpoints) != 2 || got.Endpoints[1].Endpoint != uris[1] || got.Endpoints[0].Status != "ok" ||
		got.Endpoints[1].Status != "fail" || got.Endpoints[0].Usable != 1 || got.Endpoints[0].Signed != 1 || got.Endpoints[1].Usable != 0 ||
		got.Endpoints[0].RoundTrip <= 0 || len(got.Keys) != 1 || !slices.Equal(got.Keys[0].Missing, uris[1:]) {
		t.Errorf("%s", text)
	}
}
