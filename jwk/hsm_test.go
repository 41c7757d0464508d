package jwk_test

import (
	"context"
	"encoding/hex"
	"errors"
	"os/exec"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/jwk"
	"github.com/hsmkey/hsmkey/sessionpool"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func openHSM(t *testing.T) *hsmkey.HSM {
	t.Helper()
	token := testhsm.New(t)
	hsm, err := hsmkey.Open(context.Background(), hsmkey.Config{Pool: sessionpool.Config{
		Module:     token.Module,
		TokenLabel: token.Labels[0],
		PIN:        sessionpool.StaticPIN(testhsm.PIN),
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := hsm.Close(context.Background()); err != nil {
			t.Errorf("close the HSM: %v", err)
		}
	})
	return hsm
}

// TestKeysOnTheHSMArePublished makes keys of each type on the HSM and has José
// compute their thumbprints from what we publish.
func TestKeysOnTheHSMArePublished(t *testing.T) {
	jose, err := exec.LookPath("jose")
	if err != nil {
		t.Fatal("jose not found: install the Debian package jose (or run `make deps`)")
	}
	hsm := openHSM(t)
	var keys []jwk.Key
	for _, typ := range []hsmkey.KeyType{hsmkey.RSA2048, hsmkey.P256, hsmkey.P384, hsmkey.P521, hsmkey.Ed25519} {
		key, err := hsm.Generate(context.Background(), string(typ), typ, nil)
		if err != nil {
			t.Fatal(err)
		}
		public, err := jwk.Public(key)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, public)
		if public.Algorithm() != key.Algorithms()[0] {
			t.Errorf("%s: algorithm %s, want the key's default %s", typ, public.Algorithm(), key.Algorithms()[0])
		}
		if kid, err := jwk.KeyID(key); err != nil || kid != public.KeyID() {
			t.Errorf("%s: KeyID = %q, %v, the JWK has %q", typ, kid, err, public.KeyID())
		}
		if typ == hsmkey.Ed25519 {
			continue // José does not know it
		}
		cmd := exec.Command(jose, "jwk", "thp", "-i-")
		cmd.Stdin = strings.NewReader(marshal(t, public))
		thumbprint, err := cmd.Output()
		if err != nil || strings.TrimSpace(string(thumbprint)) != public.KeyID() {
			t.Errorf("%s: José's thumbprint is %q, %v, ours %q", typ, thumbprint, err, public.KeyID())
		}
	}
	published := marshal(t, newSet(t, keys...))
	if set, err := jwk.ParseSet([]byte(published)); err != nil || len(set.Keys()) != len(keys) {
		t.Errorf("ParseSet of our own JWKS = %d keys, %v", len(set.Keys()), err)
	}
}

func TestAnHMACKeyIsNotPublished(t *testing.T) {
	hsm := openHSM(t)
	key, err := hsm.Generate(context.Background(), "secret", hsmkey.HMAC256, []byte{0xab, 0x01})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := jwk.Public(key); !errors.Is(err, hsmkey.ErrUnsupported) || !strings.Contains(err.Error(), `"secret"`) {
		t.Errorf("Public = %v, want ErrUnsupported that names the key", err)
	}
	if kid, err := jwk.KeyID(key); err != nil || kid != hex.EncodeToString([]byte{0xab, 0x01}) {
		t.Errorf("KeyID = %q, %v, want the id in hexadecimal digits", kid, err)
	}
}
