package hsmkey_test

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// The environment of this process points to a token that the examples use, as a
// reader's would. Tests make their own.
func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "hsmkey-examples-")
	if err == nil {
		err = exampleToken(dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		_ = os.RemoveAll(dir) // a temporary directory
		os.Exit(code)
	}))
}

func exampleToken(dir string) error {
	h, err := testhsm.Create(dir, "example")
	if err != nil {
		return err
	}
	for _, pair := range h.Env() {
		name, value, _ := strings.Cut(pair, "=")
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	return nil
}

// slow is a limit for PKCS#11 calls that a machine under load does not reach:
// generating a long RSA key in software under the race detector takes its time.
const slow = time.Minute

// config is the configuration of a test HSM's only token.
func config(h *testhsm.HSM) hsmkey.Config {
	return hsmkey.Config{Pool: sessionpool.Config{
		Module:     h.Module,
		TokenLabel: h.Labels[0],
		PIN:        sessionpool.StaticPIN(testhsm.PIN),
		OpTimeout:  slow,
	}}
}

// open opens an HSM until the test ends.
func open(tb testing.TB, config hsmkey.Config) *hsmkey.HSM {
	tb.Helper()
	h, err := hsmkey.Open(context.Background(), config)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := h.Close(context.Background()); err != nil {
			tb.Errorf("closing the HSM: %v", err)
		}
	})
	return h
}

// newHSM opens a fresh token until the test ends.
func newHSM(tb testing.TB) *hsmkey.HSM {
	tb.Helper()
	return open(tb, config(testhsm.New(tb)))
}

// generate makes a key or ends the test.
func generate(tb testing.TB, h *hsmkey.HSM, label string, typ hsmkey.KeyType) *hsmkey.HSMJWK {
	tb.Helper()
	key, err := h.Generate(context.Background(), label, typ, nil)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}
