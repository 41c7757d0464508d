package jwk_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jwk"
)

func newSet(t *testing.T, keys ...jwk.Key) jwk.Set {
	t.Helper()
	set, err := jwk.NewSet(keys...)
	if err != nil {
		t.Fatal(err)
	}
	return set
}

func TestASetIsReadAsItWasWritten(t *testing.T) {
	var keys []jwk.Key
	for _, key := range privateKeys() {
		keys = append(keys, fromPublic(t, key.Public()))
	}
	written := marshal(t, newSet(t, keys...))
	read, err := jwk.ParseSet([]byte(written))
	if err != nil {
		t.Fatal(err)
	}
	if got := marshal(t, read); got != written {
		t.Errorf("read and written again: %s\nwant %s", got, written)
	}
	var viaJSON jwk.Set
	if err := json.Unmarshal([]byte(written), &viaJSON); err != nil || len(viaJSON.Keys()) != len(keys) {
		t.Errorf("json.Unmarshal = %d keys, %v", len(viaJSON.Keys()), err)
	}
	var other jose.JSONWebKeySet
	if err := json.Unmarshal([]byte(written), &other); err != nil || len(other.Keys) != len(keys) {
		t.Errorf("go-jose reads %d keys, %v", len(other.Keys), err)
	}
	for _, k := range newSet(t, keys...).Jose().Keys {
		if len(other.Key(k.KeyID)) != 1 {
			t.Errorf("Jose() has the kid %q, the JWKS does not", k.KeyID)
		}
	}
}

func TestAnEmptySetHasAnArray(t *testing.T) {
	for _, set := range []jwk.Set{{}, newSet(t)} {
		if got := marshal(t, set); got != `{"keys":[]}` {
			t.Errorf("JWKS = %s", got)
		}
	}
}

func TestASetNamesEachKeyOnce(t *testing.T) {
	rsa, p256 := privateKeys()["rsa"].Public(), privateKeys()["p256"].Public()
	same := newSet(t, fromPublic(t, rsa), fromPublic(t, p256), fromPublic(t, rsa))
	if len(same.Keys()) != 2 {
		t.Errorf("a key given twice: %d keys, want 2", len(same.Keys()))
	}
	// One key for two algorithms is two JWKs.
	two := newSet(t, fromPublic(t, rsa), fromPublic(t, rsa, jwk.WithAlgorithm(hsmkey.PS256)))
	if len(two.Keys()) != 2 {
		t.Errorf("a key for two algorithms: %d keys, want 2", len(two.Keys()))
	}
	bare := newSet(t, fromPublic(t, rsa, jwk.WithKeyID("")), fromPublic(t, p256, jwk.WithKeyID("")))
	if len(bare.Keys()) != 2 {
		t.Errorf("two keys without kid: %d keys, want 2", len(bare.Keys()))
	}
	_, err := jwk.NewSet(fromPublic(t, rsa, jwk.WithKeyID("a")), fromPublic(t, p256, jwk.WithKeyID("a")))
	if !errors.Is(err, hsmkey.ErrConfig) || !strings.Contains(err.Error(), `"a"`) {
		t.Errorf("two keys with one kid: %v, want ErrConfig that names it", err)
	}
	if _, err := jwk.NewSet(jwk.Key{}); !errors.Is(err, hsmkey.ErrUnsupported) {
		t.Errorf("a set of the zero Key: %v, want ErrUnsupported", err)
	}
}

func TestUnknownAndIncompleteKeysOfASetAreLeftOut(t *testing.T) {
	set, err := jwk.ParseSet([]byte(`{"extra":1,"keys":[
		{"kty":"unheard-of","kid":"1"}, {"kty":"EC","crv":"secp256k1","x":"AQ","y":"AQ"}, {"kty":"RSA"},
		{"kty":"OKP","crv":"X25519","x":"AQ"}, {}, null, 7, ` + ed25519JWK + `, ` + ed25519JWK + `]}`))
	if err != nil {
		t.Fatal(err)
	}
	if got := len(set.Keys()); got != 2 {
		t.Errorf("%d keys are left, want the two that are known", got)
	}
}

func TestASingleJWKIsASetOfOne(t *testing.T) {
	set, err := jwk.ParseSet([]byte(ed25519JWK))
	if err != nil || len(set.Keys()) != 1 {
		t.Errorf("ParseSet = %d keys, %v", len(set.Keys()), err)
	}
}

func TestWhatIsNoJWKSetIsRefused(t *testing.T) {
	for _, text := range []string{
		``, `null`, `[]`, `{}`, `{"keys":null}`, `{"keys":{}}`, `{"keys":[]`, `{"KEYS":[]}`,
		`{"keys":[],"keys":[]}`, strings.Repeat("[", 100000), "\uFEFF" + `{"keys":[]}`, `{"kty":"RSA"}`,
	} {
		if _, err := jwk.ParseSet([]byte(text)); !errors.Is(err, hsmkey.ErrConfig) {
			t.Errorf("ParseSet(%.40q) = %v, want ErrConfig", text, err)
		}
	}
	set := newSet(t, fromPublic(t, privateKeys()["rsa"].Public()))
	if err := json.Unmarshal([]byte(`{"keys":7}`), &set); !errors.Is(err, hsmkey.ErrConfig) || len(set.Keys()) != 1 {
		t.Errorf("Unmarshal = %v, want ErrConfig and the old set", err)
	}
}

func FuzzParseSet(f *testing.F) {
	f.Add([]byte(ed25519JWK))
	f.Add([]byte(rsaJWK))
	f.Add([]byte(`{"keys":[` + ed25519JWK + `,` + rsaJWK + `,{"kty":"oct","k":"AQ"}]}`))
	f.Add([]byte(`{"keys":[{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0","key_ops":["verify"]}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		set, err := jwk.ParseSet(data)
		if err != nil {
			for _, known := range []error{hsmkey.ErrConfig, hsmkey.ErrUnsupported, jwk.ErrPrivate} {
				if errors.Is(err, known) {
					return
				}
			}
			t.Fatalf("an error without a sentinel: %v", err)
		}
		// What was read can be written, is public, and is the same when read again.
		written, err := json.Marshal(set)
		if err != nil {
			t.Fatal(err)
		}
		again, err := jwk.ParseSet(written)
		if err != nil {
			t.Fatalf("%v: %s", err, written)
		}
		if second, err := json.Marshal(again); err != nil || string(second) != string(written) {
			t.Fatalf("written %s, then %s, %v", written, second, err)
		}
		for _, k := range set.Jose().Keys {
			if !k.IsPublic() {
				t.Fatalf("a %T was read", k.Key)
			}
		}
	})
}
