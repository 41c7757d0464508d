package doctor_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/doctor"
	"github.com/hsmkey/hsmkey/internal/fault"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

const healthy = "module, slots, PIN source, token, PIN state, login, mechanisms, session limit, round trip, keys, signature"

func TestAnHSMThatWorksIsOK(t *testing.T) {
	test := testhsm.New(t)
	testhsm.GenerateEC(t, test, "demo", "0a")
	r := run(t, config(test))
	wantNames(t, all(r), healthy)
	if r.Status != doctor.OK || len(r.Failures()) != 0 || len(r.Endpoints) != 1 {
		t.Errorf("%+v", r)
	}
	e := r.Endpoints[0]
	if e.Token != test.Labels[0] || e.Transport != doctor.InProcess || e.Login != doctor.Verified || e.Sessions != 16 ||
		len(e.Algorithms) != 13 || e.RoundTrip <= 0 || !strings.HasPrefix(e.Library, "Implementation of PKCS11 2.") {
		t.Errorf("%+v", e)
	}
	if d := check(t, e.Checks, "keys").Detail; d != "1 key" || e.UsableKeys != 1 || e.SignedKeys != 1 {
		t.Errorf("keys: %s, %+v", d, e)
	}

	r = run(t, config(test), withKey("demo"))
	wantNames(t, r.Endpoints[0].Checks, "token, PIN state, login, mechanisms, session limit, round trip, key, signature")
	if e := r.Endpoints[0]; r.Status != doctor.OK || e.Key != doctor.Usable || e.Signature <= 0 {
		t.Errorf("%+v", e)
	}
}

func TestKeysOfEveryTypeAreTested(t *testing.T) {
	test := testhsm.New(t)
	h := open(t, config(test))
	for _, typ := range []hsmkey.KeyType{hsmkey.RSA2048, hsmkey.P256, hsmkey.P384, hsmkey.P521, hsmkey.Ed25519, hsmkey.HMAC256} {
		if _, err := h.Generate(t.Context(), string(typ), typ, nil); err != nil {
			t.Fatal(err)
		}
		r := run(t, config(test), withKey(string(typ)))
		if r.Status != doctor.OK || !strings.Contains(check(t, all(r), "key").Detail, string(typ)) {
			t.Errorf("%s: %s", typ, names(all(r)))
		}
	}
}

func TestAModuleThatIsNoneFails(t *testing.T) {
	for name, path := range map[string]string{"missing": "/nowhere/lib.so", "text": write(t, 0o600, "no library"), "unset": ""} {
		r := run(t, hsmkey.Config{Pool: sessionpool.Config{Module: path}})
		wantNames(t, all(r), "module=fail")
		if c := check(t, r.Checks, "module"); !errors.Is(c.Err, hsmkey.ErrConfig) || r.Status != doctor.Fail {
			t.Errorf("%s: %v", name, c.Err)
		}
	}
	test := testhsm.New(t)
	injector := fault.New()
	injector.FailAll("C_Initialize", pkcs11.CKR_GENERAL_ERROR)
	c := config(test)
	c.Pool.Wrap = injector.Wrap
	if got := check(t, run(t, c).Checks, "module"); !errors.Is(got.Err, hsmkey.ErrSession) {
		t.Errorf("%v", got.Err)
	}
}

func TestNoTokenOrSeveralFail(t *testing.T) {
	test := testhsm.New(t, "north", "east")
	c := config(test)
	c.Pool.TokenLabel = ""
	r := run(t, c)
	wantNames(t, all(r), "module, slots, PIN source, token=fail")
	if f := r.Failures(); !errors.Is(f[0].Err, hsmkey.ErrConfig) || !strings.Contains(f[0].Detail, "north") {
		t.Errorf("%v", f)
	}
	c.Pool.TokenLabel = "west"
	wantNames(t, all(run(t, c)), "module, slots, PIN source, token=fail")

	empty := filepath.Join(t.TempDir(), "softhsm2.conf")
	if err := os.WriteFile(empty, []byte("directories.tokendir = "+t.TempDir()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", empty)
	r = run(t, c)
	wantNames(t, all(r), "module, slots=fail")
	if f := r.Failures(); !errors.Is(f[0].Err, hsmkey.ErrConfig) {
		t.Errorf("%v", f)
	}
}

func TestASlotThatDoesNotAnswerIsAWarning(t *testing.T) {
	test := testhsm.New(t, "good", "odd")
	testhsm.GenerateEC(t, test, "demo", "0a")
	c := config(test)
	odd := false
	c.Pool.Wrap = func(m sessionpool.Module) sessionpool.Module {
		return &tokens{Module: m, edit: func(i *pkcs11.TokenInfo) error {
			if odd = strings.HasPrefix(i.Label, "odd"); odd {
				return pkcs11.Error(pkcs11.CKR_DEVICE_ERROR)
			}
			return nil
		}}
	}
	wantNames(t, all(run(t, c)), strings.Replace(healthy, "slots", "slots=warn", 1))
}

// tokens changes what C_GetTokenInfo says.
type tokens struct {
	sessionpool.Module
	edit func(*pkcs11.TokenInfo) error
}

func (m *tokens) GetTokenInfo(slot uint) (pkcs11.TokenInfo, error) {
	info, err := m.Module.GetTokenInfo(slot)
	if err == nil {
		err = m.edit(&info)
	}
	return info, err
}

func TestThePINIsNotSentToATokenInABadState(t *testing.T) {
	test := testhsm.New(t)
	testhsm.GenerateEC(t, test, "demo", "0a")
	for _, state := range []struct {
		name   string
		set    uint
		clear  uint
		status doctor.Status
	}{
		{"locked", pkcs11.CKF_USER_PIN_LOCKED, 0, doctor.Fail},
		{"final try", pkcs11.CKF_USER_PIN_FINAL_TRY | pkcs11.CKF_USER_PIN_COUNT_LOW, 0, doctor.Fail},
		{"no PIN yet", 0, pkcs11.CKF_USER_PIN_INITIALIZED, doctor.Fail},
		{"low", pkcs11.CKF_USER_PIN_COUNT_LOW, 0, doctor.Warn},
		{"to be changed", pkcs11.CKF_USER_PIN_TO_BE_CHANGED, 0, doctor.Warn},
	} {
		injector := fault.New()
		c := config(test)
		c.Pool.Wrap = func(m sessionpool.Module) sessionpool.Module {
			return &tokens{Module: injector.Wrap(m), edit: func(i *pkcs11.TokenInfo) error {
				i.Flags = i.Flags&^state.clear | state.set
				return nil
			}}
		}
		r := run(t, c)
		want, logins := "token, PIN state="+string(state.status)+", mechanisms, session limit, round trip", 0
		if state.status == doctor.Warn {
			want, logins = strings.Replace(want, ", mech", ", login, mech", 1)+", keys, signature", 1
		} else if !errors.Is(r.Failures()[0].Err, hsmkey.ErrPIN) {
			t.Errorf("%s: %v", state.name, r.Failures())
		}
		wantNames(t, r.Endpoints[0].Checks, want)
		if check(t, r.Endpoints[0].Checks, "PIN state"); injector.Calls("C_Login") != logins {
			t.Errorf("%s: %d logins, want %d", state.name, injector.Calls("C_Login"), logins)
		}
	}
}

func TestAWrongPINIsSentOnce(t *testing.T) {
	test := testhsm.New(t)
	testhsm.GenerateEC(t, test, "demo", "0a")
	spy, calls := testhsm.Spy(t, test)
	c := config(test)
	c.Pool.Module, c.Pool.PIN = spy, sessionpool.StaticPIN("not-"+testhsm.PIN)
	r := run(t, c, withKey("demo"))
	wantNames(t, all(r), "module, slots, PIN source, token, PIN state, login=fail, mechanisms, session limit, round trip")
	if f := r.Failures(); len(f) != 1 || !errors.Is(f[0].Err, hsmkey.ErrPIN) {
		t.Errorf("%v", f)
	}
	if n := calls("C_Login"); n != 1 {
		t.Errorf("%d calls of C_Login, want 1", n)
	}

	// The token remembers.
	wantNames(t, all(run(t, config(test))), strings.Replace(healthy, "PIN state", "PIN state=warn", 1))
}

func TestALoginBySomebodyElseLeavesThePINUnverified(t *testing.T) {
	test := testhsm.New(t)
	testhsm.GenerateEC(t, test, "demo", "0a")
	other := pkcs11.New(test.Module)
	if err := other.Initialize(); err != nil {
		t.Fatal(err)
	}
	defer other.Destroy()
	defer func() {
		if err := other.Finalize(); err != nil {
			t.Error(err)
		}
	}()
	slots, err := other.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	session, err := other.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Login(session, pkcs11.CKU_USER, testhsm.PIN); err != nil {
		t.Fatal(err)
	}
	c := config(test)
	c.Pool.PIN = sessionpool.StaticPIN("not-" + testhsm.PIN)
	r := run(t, c)
	wantNames(t, all(r), strings.Replace(healthy, "login", "login=warn", 1))
	if r.Status != doctor.Warn || r.Endpoints[0].Login != doctor.Unverified {
		t.Errorf("%+v", r.Endpoints[0])
	}
	if _, err := other.GetSessionInfo(session); err != nil {
		t.Errorf("the other one's session: %v", err)
	}
}

func TestWithoutAPINPrivateKeysDoNotShow(t *testing.T) {
	test := testhsm.New(t)
	testhsm.GenerateEC(t, test, "demo", "0a")
	c := config(test)
	c.Pool.PIN = nil
	r := run(t, c)
	wantNames(t, all(r), "module, slots, PIN source, token, PIN state, login=warn, mechanisms, session limit, round trip, keys=fail")
	if c := check(t, all(r), "keys"); !errors.Is(c.Err, hsmkey.ErrKeyNotFound) || !strings.Contains(c.Hint, "PIN") {
		t.Errorf("%+v", c)
	}
	if got := r.Endpoints[0].Login; got != doctor.NoPIN {
		t.Errorf("login %q", got)
	}
}

func TestATokenWithOneSessionWorks(t *testing.T) {
	test := testhsm.New(t)
	testhsm.GenerateEC(t, test, "demo", "0a")
	c := config(test)
	c.Pool.Wrap = func(m sessionpool.Module) sessionpool.Module {
		return &tokens{Module: m, edit: func(i *pkcs11.TokenInfo) error { i.MaxSessionCount = 1; return nil }}
	}
	for _, list := range []string{"", write(t, 0o600, "pkcs11:token="+test.Labels[0]+"?module-path="+test.Module)} {
		c.Balance.Lists = list
		r := run(t, c, withKey("demo"))
		wantNames(t, r.Endpoints[0].Checks, "token, PIN state, login, mechanisms, session limit=warn, round trip, key, signature")
		if e := r.Endpoints[0]; e.Sessions != 1 || e.TokenLimit != 1 {
			t.Errorf("%+v", e)
		}
	}
}

// lists replaces the list of mechanisms.
type lists struct {
	sessionpool.Module
	mechanisms []uint
}

func (m lists) GetMechanismList(uint) (list []*pkcs11.Mechanism, err error) {
	for _, number := range m.mechanisms {
		list = append(list, pkcs11.NewMechanism(number, nil))
	}
	return list, nil
}

func TestATokenThatSignsNothingFails(t *testing.T) {
	test := testhsm.New(t)
	for _, mechanisms := range [][]uint{{pkcs11.CKM_MD5}, {pkcs11.CKM_ECDSA_SHA256, pkcs11.CKM_MD5}} {
		c := config(test)
		c.Pool.Wrap = func(m sessionpool.Module) sessionpool.Module { return lists{m, mechanisms} }
		r := run(t, c)
		got := check(t, all(r), "mechanisms")
		if able := slices.Contains(mechanisms, pkcs11.CKM_ECDSA_SHA256); able && got.Detail != "ES256" || !able && !errors.Is(got.Err, hsmkey.ErrUnsupported) {
			t.Errorf("%x: %+v", mechanisms, got)
		}
	}
}

func TestAKeyThatIsNotThereOrNotTheOnlyOneFails(t *testing.T) {
	test := testhsm.New(t)
	testhsm.GenerateEC(t, test, "twin", "01")
	testhsm.GenerateEC(t, test, "twin", "02")
	testhsm.PKCS11Tool(t, test, "--keypairgen", "--key-type", "EC:secp256k1", "--label", "odd", "--id", "03")
	for label, want := range map[string]struct {
		state doctor.KeyState
		err   error
	}{
		"missing": {doctor.Missing, hsmkey.ErrKeyNotFound},
		"twin":    {doctor.Ambiguous, hsmkey.ErrAmbiguous},
		"odd":     {doctor.Unusable, hsmkey.ErrUnsupported},
	} {
		r := run(t, config(test), withKey(label))
		wantNames(t, r.Endpoints[0].Checks, "token, PIN state, login, mechanisms, session limit, round trip, key=fail")
		if c := check(t, all(r), "key"); !errors.Is(c.Err, want.err) || r.Endpoints[0].Key != want.state {
			t.Errorf("%s: %q, %v", label, r.Endpoints[0].Key, c.Err)
		}
	}
	byID := func(o *doctor.Options) { o.Key = hsmkey.Query{Label: "twin", ID: []byte{2}} }
	if r := run(t, config(test), byID); r.Status != doctor.OK {
		t.Errorf("by its id: %s", names(all(r)))
	}
	if d := check(t, all(run(t, config(test))), "keys").Detail; !strings.HasPrefix(d, "2 keys, and 1 for other purposes") {
		t.Errorf("keys: %s", d)
	}
}

// forger signs, but not with the key.
type forger struct{ sessionpool.Module }

func (m forger) SignSingle(_ []byte, _ pkcs11.SessionHandle, _ *pkcs11.Mechanism, _ pkcs11.ObjectHandle, _ []byte, size int) ([]byte, error) {
	return slices.Repeat([]byte{1}, size), nil
}

func TestWithoutAKeyThereIsNoSignature(t *testing.T) {
	test := testhsm.New(t)
	for _, others := range []string{"no key for tokens", "no key for tokens, and 1 for other purposes"} {
		r := run(t, config(test))
		wantNames(t, all(r), strings.Replace(healthy, "keys, signature", "keys=fail", 1))
		if c := check(t, all(r), "keys"); !errors.Is(c.Err, hsmkey.ErrKeyNotFound) || c.Detail != others {
			t.Errorf("%+v, want %s", c, others)
		}
		aes(t, open(t, config(test)), "wrapping")
	}
}

func TestEveryKeySignsOnce(t *testing.T) {
	test := testhsm.New(t)
	h := open(t, config(test))
	for n, typ := range []hsmkey.KeyType{hsmkey.Ed25519, hsmkey.RSA2048, hsmkey.P256} {
		if _, err := h.Generate(t.Context(), fmt.Sprint(n), typ, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	c := config(test)
	injector := fault.New()
	c.Pool.Wrap = injector.Wrap
	r := run(t, c)
	wantNames(t, all(r), healthy)
	if e := r.Endpoints[0]; e.UsableKeys != 3 || e.SignedKeys != 3 {
		t.Errorf("%+v", e)
	}

	// Which one fails is told, and the others sign.
	injector.Fail("C_Sign", 1, pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED)
	r = run(t, c)
	wantNames(t, all(r), healthy+"=fail")
	if got := check(t, all(r), "signature"); !strings.Contains(got.Detail, `"0"`) || r.Endpoints[0].SignedKeys != 2 {
		t.Errorf("%+v, %+v", got, r.Endpoints[0])
	}
}

func TestOfManyKeysSomeSign(t *testing.T) {
	test := testhsm.New(t)
	h := open(t, config(test))
	for n := range byte(18) {
		put(t, h, fmt.Sprintf("key %02d", n), newKeyOnce(t), n+1)
	}
	if err := h.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	c := config(test)
	injector := fault.New()
	c.Pool.Wrap = injector.Wrap
	r := run(t, c)
	wantNames(t, all(r), healthy)
	e := r.Endpoints[0]
	if d := check(t, e.Checks, "signature").Detail; e.UsableKeys != 18 || e.SignedKeys != 16 || !strings.Contains(d, "16 keys of 18") {
		t.Errorf("%s, %+v", d, e)
	}

	// One that does not answer is not asked for each of them.
	injector.FailAll("C_Sign", pkcs11.CKR_DEVICE_ERROR)
	r = run(t, c)
	wantNames(t, all(r), healthy+"=fail")
	if f := r.Failures(); !errors.Is(f[0].Err, hsmkey.ErrSession) {
		t.Errorf("%v, want ErrSession", f)
	}
}

func TestASignatureThatDoesNotVerifyFails(t *testing.T) {
	test := testhsm.New(t)
	testhsm.GenerateEC(t, test, "demo", "01")
	c := config(test)
	c.Pool.Wrap = func(m sessionpool.Module) sessionpool.Module { return forger{m} }
	r := run(t, c, withKey("demo"))
	if got := check(t, all(r), "signature"); !errors.Is(got.Err, hsmkey.ErrUnsupported) || r.Endpoints[0].Signature != 0 {
		t.Errorf("%+v", got)
	}

	injector := fault.New()
	injector.FailAll("C_Sign", pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED)
	c.Pool.Wrap = injector.Wrap
	if got := check(t, all(run(t, c, withKey("demo"))), "signature"); got.Status != doctor.Fail {
		t.Errorf("%+v", got)
	}
}

func TestThePINFileIsForItsOwnerOnly(t *testing.T) {
	test := testhsm.New(t)
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, file := range []struct {
		path   string
		status doctor.Status
	}{
		{write(t, 0o600, testhsm.PIN), doctor.OK},
		{write(t, 0o400, testhsm.PIN), doctor.OK},
		{pipe, doctor.OK}, // it is not read
		{write(t, 0o640, testhsm.PIN), doctor.Warn},
		{write(t, 0o620, testhsm.PIN), doctor.Warn},
		{write(t, 0o604, testhsm.PIN), doctor.Warn},
		{write(t, 0o666, testhsm.PIN), doctor.Warn},
		{"/nowhere/pin", doctor.Fail},
		{t.TempDir(), doctor.Fail},
	} {
		r := run(t, config(test), func(o *doctor.Options) { o.PIN = doctor.PINOrigin{File: file.path} })
		got := check(t, r.Checks, "PIN source")
		if got.Status != file.status || !strings.Contains(got.Detail, file.path) || got.Status == doctor.Fail && !errors.Is(got.Err, hsmkey.ErrPIN) {
			t.Errorf("%s: %+v, want %s", file.path, got, file.status)
		}
	}
}
