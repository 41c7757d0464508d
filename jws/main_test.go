package jws_test

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// TestMain points the environment to a token with the key "issuer", on which the
// examples run. Tests make their own.
func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "jws")
	if err == nil {
		err = prepareExamples(dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(status int) {
		_ = os.RemoveAll(dir)
		os.Exit(status)
	}))
}

func prepareExamples(dir string) error {
	token, err := testhsm.Create(dir)
	if err != nil {
		return err
	}
	for _, pair := range token.Env() {
		name, value, _ := strings.Cut(pair, "=")
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	ctx := context.Background()
	cfg, err := hsmkey.FromEnv()
	if err != nil {
		return err
	}
	hsm, err := hsmkey.Open(ctx, cfg)
	if err != nil {
		return err
	}
	if _, err := hsm.Generate(ctx, "issuer", hsmkey.P256, nil); err != nil {
		return err
	}
	return hsm.Close(ctx)
}

// openHSM opens a new token for the test.
func openHSM(tb testing.TB) *hsmkey.HSM {
	tb.Helper()
	token := testhsm.New(tb)
	hsm, err := hsmkey.Open(context.Background(), hsmkey.Config{Pool: sessionpool.Config{
		Module:     token.Module,
		TokenLabel: token.Labels[0],
		PIN:        sessionpool.StaticPIN(testhsm.PIN),
	}})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := hsm.Close(context.Background()); err != nil {
			tb.Errorf("close the HSM: %v", err)
		}
	})
	return hsm
}

func generate(tb testing.TB, hsm *hsmkey.HSM, typ hsmkey.KeyType) *hsmkey.HSMJWK {
	tb.Helper()
	key, err := hsm.Generate(context.Background(), string(typ), typ, nil)
	if err != nil {
		tb.Fatalf("generate %s: %v", typ, err)
	}
	return key
}

func importKey(tb testing.TB, hsm *hsmkey.HSM, label string, private any) *hsmkey.HSMJWK {
	tb.Helper()
	key, err := hsm.Import(context.Background(), label, private, nil)
	if err != nil {
		tb.Fatalf("import %s: %v", label, err)
	}
	return key
}
