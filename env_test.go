package hsmkey_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/testhsm"
)

// variables are those that FromEnv reads.
var variables = []string{
	"HSM_MODULE", "HSM_MODULE_ARGS", "HSM_TOKEN", "HSM_PIN", "HSM_PIN_FILE",
	"HSM_DISABLE_SESSION_CACHE", "HSM_OP_TIMEOUT", "HSM_PIX_HTTP_CONN_REFRESH_INTERVAL",
	"HSM_LOAD_BALANCE_LIST", "HSM_LB_FILE_REFRESH_INTERVAL", "HSM_BALANCE_SUSPEND_TIME",
}

// setenv sets the environment of FromEnv to these variables and no others.
func setenv(t *testing.T, pairs ...string) {
	t.Helper()
	for _, name := range variables {
		t.Setenv(name, "")
		if err := os.Unsetenv(name); err != nil {
			t.Fatal(err)
		}
	}
	for _, pair := range pairs {
		name, value, _ := strings.Cut(pair, "=")
		t.Setenv(name, value)
	}
}

func fromEnv(t *testing.T) hsmkey.Config {
	t.Helper()
	c, err := hsmkey.FromEnv()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestTheEnvironmentOfATestHSMIsEnough(t *testing.T) {
	test := testhsm.New(t)
	setenv(t, test.Env()...)
	h := open(t, fromEnv(t))
	generate(t, h, "key", hsmkey.P256)
	mustFind(t, h, hsmkey.Query{Label: "key"})
}

func TestWithoutVariablesTheDefaultsHold(t *testing.T) {
	setenv(t)
	c := fromEnv(t)
	if c.Pool.Module != testhsm.ModulePath() {
		t.Errorf("module %q, want the installed SoftHSM2 %q", c.Pool.Module, testhsm.ModulePath())
	}
	if c.Pool.PIN != nil || c.Pool.TokenLabel != "" || c.Pool.DisableCache || c.Pool.OpTimeout != 0 || c.PixRefresh != 0 {
		t.Errorf("%+v, want zero values", c)
	}
	// The only token is found, and the PIN is missed with a hint.
	testhsm.New(t)
	if _, err := open(t, c).Key(context.Background(), hsmkey.Query{Label: "key"}); !errors.Is(err, hsmkey.ErrKeyNotFound) || !strings.Contains(err.Error(), "PIN") {
		t.Errorf("Key = %v", err)
	}
}

func TestEveryVariableIsRead(t *testing.T) {
	setenv(t, "HSM_MODULE=/some/module.so", "HSM_MODULE_ARGS=configdir='x'", "HSM_TOKEN=a token", "HSM_PIN=1234",
		"HSM_DISABLE_SESSION_CACHE=1", "HSM_OP_TIMEOUT=1500ms", "HSM_PIX_HTTP_CONN_REFRESH_INTERVAL=60")
	c := fromEnv(t)
	if c.Pool.Module != "/some/module.so" || c.Pool.ModuleArgs != "configdir='x'" || c.Pool.TokenLabel != "a token" ||
		!c.Pool.DisableCache || c.Pool.OpTimeout != 1500*time.Millisecond || c.PixRefresh != time.Minute {
		t.Errorf("read %+v", c)
	}
	if pin, err := c.Pool.PIN(context.Background()); pin != "1234" || err != nil {
		t.Errorf("PIN() = %q, %v", pin, err)
	}
}

func TestTheSessionCacheIsOnUnlessItsVariableSaysOtherwise(t *testing.T) {
	test := testhsm.New(t)
	for variable, opened := range map[string]int{
		"HSM_DISABLE_SESSION_CACHE=": 0, "HSM_DISABLE_SESSION_CACHE=0": 0, "HSM_DISABLE_SESSION_CACHE=1": 3,
	} {
		module, calls := testhsm.Spy(t, test)
		setenv(t, append(test.Env(), "HSM_MODULE="+module, variable)...)
		h, err := hsmkey.Open(context.Background(), fromEnv(t))
		if err != nil {
			t.Fatal(err)
		}
		list := func() {
			if _, err := h.Keys(context.Background()); err != nil {
				t.Errorf("%s: %v", variable, err)
			}
		}
		list()
		before := calls("C_OpenSession")
		for range 3 {
			list()
		}
		if n := calls("C_OpenSession") - before; n != opened {
			t.Errorf("%s: three calls opened %d sessions, want %d", variable, n, opened)
		}
		if n := calls("C_Login"); n != 1 {
			t.Errorf("%s: %d logins, want one", variable, n)
		}
		if err := h.Close(context.Background()); err != nil {
			t.Error(err)
		}
	}
}

func TestThePINComesFromItsFile(t *testing.T) {
	test := testhsm.New(t)
	file := filepath.Join(t.TempDir(), "pin")
	setenv(t, "HSM_MODULE="+test.Module, "HSM_PIN_FILE="+file)
	if err := os.WriteFile(file, []byte(testhsm.PIN+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	generate(t, open(t, fromEnv(t)), "key", hsmkey.P256)
}

func TestAnUnreadableOrEmptyPINIsAnErrorBeforeTheLogin(t *testing.T) {
	test := testhsm.New(t)
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, variable := range []string{"HSM_PIN=", "HSM_PIN_FILE=" + empty, "HSM_PIN_FILE=/nowhere/pin", "HSM_PIN_FILE=" + t.TempDir()} {
		module, calls := testhsm.Spy(t, test)
		setenv(t, "HSM_MODULE="+module, variable)
		h, err := hsmkey.Open(context.Background(), fromEnv(t))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.Keys(context.Background()); !errors.Is(err, hsmkey.ErrPIN) {
			t.Errorf("%s: %v, want ErrPIN", variable, err)
		}
		if err := h.Close(context.Background()); err != nil {
			t.Fatal(err)
		}
		if n := calls("C_Login"); n != 0 {
			t.Errorf("%s: %d logins", variable, n)
		}
	}
}

func TestAWrongPINCostsOneAttempt(t *testing.T) {
	test := testhsm.New(t)
	module, calls := testhsm.Spy(t, test)
	setenv(t, "HSM_MODULE="+module, "HSM_PIN=not the right one")
	h := open(t, fromEnv(t))
	for range 3 {
		for name, err := range map[string]error{
			"Key":      second(h.Key(context.Background(), hsmkey.Query{Label: "key"})),
			"Keys":     second(h.Keys(context.Background())),
			"Generate": second(h.Generate(context.Background(), "key", hsmkey.P256, nil)),
			"Delete":   h.Delete(context.Background(), hsmkey.Query{Label: "key"}),
		} {
			if !errors.Is(err, hsmkey.ErrPIN) {
				t.Errorf("%s = %v, want ErrPIN", name, err)
			}
			if err != nil && strings.Contains(err.Error(), "not the right one") {
				t.Errorf("%s quotes the PIN: %v", name, err)
			}
		}
	}
	if n := calls("C_Login"); n != 1 {
		t.Errorf("%d logins, want 1", n)
	}
}

func second[T any](_ T, err error) error { return err }

func TestAVariableThatCannotBeParsedIsNamed(t *testing.T) {
	for _, pair := range []string{
		"HSM_DISABLE_SESSION_CACHE=2", "HSM_DISABLE_SESSION_CACHE=true", "HSM_DISABLE_SESSION_CACHE= 1",
		"HSM_OP_TIMEOUT=0", "HSM_OP_TIMEOUT=-1s", "HSM_OP_TIMEOUT=fast", "HSM_OP_TIMEOUT=0.0s", "HSM_OP_TIMEOUT=9999h", "HSM_OP_TIMEOUT=99999999999999999999",
		"HSM_PIX_HTTP_CONN_REFRESH_INTERVAL=-1", "HSM_PIX_HTTP_CONN_REFRESH_INTERVAL=1m", "HSM_PIX_HTTP_CONN_REFRESH_INTERVAL=99999999999",
		"HSM_PIX_HTTP_CONN_REFRESH_INTERVAL=86401", "HSM_BALANCE_SUSPEND_TIME=100000", "HSM_BALANCE_SUSPEND_TIME=0", "HSM_LB_FILE_REFRESH_INTERVAL=86401",
	} {
		setenv(t, pair)
		name, value, _ := strings.Cut(pair, "=")
		_, err := hsmkey.FromEnv()
		if !errors.Is(err, hsmkey.ErrConfig) || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), value) {
			t.Errorf("%s: %v, want ErrConfig that names both", pair, err)
		}
	}
	for pair, want := range map[string]time.Duration{"HSM_OP_TIMEOUT=30": 30 * time.Second, "HSM_OP_TIMEOUT=2m": 2 * time.Minute} {
		setenv(t, pair)
		if got := fromEnv(t).Pool.OpTimeout; got != want {
			t.Errorf("%s: %v, want %v", pair, got, want)
		}
	}
}

// What a variable may say, the rest does not refuse without its name.
func TestTheLongestTimesAreAccepted(t *testing.T) {
	list := filepath.Join(t.TempDir(), "list")
	if err := os.WriteFile(list, []byte("127.0.0.1 4433\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	setenv(t, "HSM_LOAD_BALANCE_LIST="+list, "HSM_LB_FILE_REFRESH_INTERVAL=86400", "HSM_BALANCE_SUSPEND_TIME=86400", "HSM_OP_TIMEOUT=24h")
	open(t, fromEnv(t))
}

func TestTwoSourcesOfThePINAreRefusedWithoutQuotingIt(t *testing.T) {
	setenv(t, "HSM_PIN="+testhsm.PIN, "HSM_PIN_FILE=/run/pin")
	_, err := hsmkey.FromEnv()
	if !errors.Is(err, hsmkey.ErrConfig) || !strings.Contains(err.Error(), "HSM_PIN_FILE") {
		t.Errorf("FromEnv = %v, want ErrConfig", err)
	}
	if err != nil && strings.Contains(err.Error(), testhsm.PIN) {
		t.Errorf("the error quotes the PIN: %v", err)
	}
}
