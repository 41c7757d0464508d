package jws_test

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"math"
	"strings"
	"sync"
	"testing"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/google/go-cmp/cmp"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jwk"
	"github.com/hsmkey/hsmkey/jws"
)

// headerOf returns the protected header of a compact token.
func headerOf(t *testing.T, token string) string {
	t.Helper()
	header, _, _ := strings.Cut(token, ".")
	decoded, err := base64.RawURLEncoding.DecodeString(header)
	if err != nil {
		t.Fatalf("%v in the header of %q", err, token)
	}
	return string(decoded)
}

func newSigner(t testing.TB, key *hsmkey.HSMJWK, opts jws.Options) *jws.Signer {
	t.Helper()
	signer, err := jws.NewSigner(key, opts)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

func sign(t *testing.T, signer *jws.Signer, payload string) string {
	t.Helper()
	token, err := signer.Sign(context.Background(), []byte(payload))
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func TestATokenIsTheSameBytesAsGoJOSEs(t *testing.T) {
	hsm := openHSM(t)
	keys := []*hsmkey.HSMJWK{
		generate(t, hsm, hsmkey.RSA2048), generate(t, hsm, hsmkey.P256), generate(t, hsm, hsmkey.Ed25519),
		generate(t, hsm, hsmkey.HMAC512),
	}
	options := map[string]jws.Options{
		"no options": {},
		"no kid":     {NoKeyID: true},
		"all options": {KeyID: "2026/1 <é>", Type: "at+jwt", ContentType: "json", Header: map[string]any{
			"zz": "<&>\u2028", "aa": []any{1.5, nil, true, map[string]int{"b": 1, "a": 2}}, "ü": 1 << 60,
			"raw": json.RawMessage(`{"x": 1e2, "w": "\u0041"}`), "url": "https://ca.example/order/1",
		}},
	}
	payload := []byte(`{"iss":"test"}`)
	for _, key := range keys {
		for _, alg := range key.Algorithms() {
			for name, opts := range options {
				t.Run(string(alg)+" "+name, func(t *testing.T) {
					opts.Algorithm = alg
					signer := newSigner(t, key, opts)
					object, err := signer.Jose().Sign(payload)
					if err != nil {
						t.Fatal(err)
					}
					compact, err := object.CompactSerialize()
					if err != nil {
						t.Fatal(err)
					}
					ours := sign(t, signer, string(payload))
					flattened, err := signer.SignFormat(context.Background(), payload, jws.Flattened)
					if err != nil {
						t.Fatal(err)
					}
					if deterministic(alg) {
						if ours != compact {
							t.Errorf("compact: %s\nwant %s", ours, compact)
						}
						if want := object.FullSerialize(); flattened != want {
							t.Errorf("flattened: %s\nwant %s", flattened, want)
						}
					}
					if ours[:strings.LastIndexByte(ours, '.')] != compact[:strings.LastIndexByte(compact, '.')] || len(ours) != len(compact) {
						t.Errorf("compact: %s\nwant, up to the signature, %s", ours, compact)
					}
				})
			}
		}
	}
}

func TestTheHeaderIsWhatTheOptionsSay(t *testing.T) {
	hsm := openHSM(t)
	key := generate(t, hsm, hsmkey.P256)
	thumbprint, err := jwk.Thumbprint(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	for want, opts := range map[string]jws.Options{
		`{"alg":"ES256","kid":"` + thumbprint + `"}`: {},
		`{"alg":"ES256"}`:                        {NoKeyID: true},
		`{"alg":"ES256","kid":"k1","typ":"JWT"}`: {KeyID: "k1", Type: "JWT"},
		`{"alg":"ES256","cty":"json","kid":"k1","nested":{"a":[1,"\u003c"]}}`: {KeyID: "k1", ContentType: "json", Header: map[string]any{"nested": map[string]any{"a": []any{1, "<"}}}},
	} {
		if got := headerOf(t, sign(t, newSigner(t, key, opts), "{}")); got != want {
			t.Errorf("header %s, want %s", got, want)
		}
	}
}

func TestTheKidOfAnHMACKeyIsItsID(t *testing.T) {
	key := generate(t, openHSM(t), hsmkey.HMAC256)
	signer := newSigner(t, key, jws.Options{})
	want := hex.EncodeToString(key.ID())
	if signer.KeyID() != want || len(want) == 0 || signer.Algorithm() != hsmkey.HS256 {
		t.Errorf("kid %q, alg %s, want kid %q and HS256", signer.KeyID(), signer.Algorithm(), want)
	}
	if got := headerOf(t, sign(t, signer, "{}")); got != `{"alg":"HS256","kid":"`+want+`"}` {
		t.Errorf("header %s", got)
	}
	if _, err := jwk.Public(key); !errors.Is(err, hsmkey.ErrUnsupported) {
		t.Errorf("jwk.Public = %v, want ErrUnsupported", err)
	}
}

func TestExtraHeadersOverrideNothing(t *testing.T) {
	key := generate(t, openHSM(t), hsmkey.P256)
	for _, name := range []string{
		"alg", "kid", "typ", "cty", "jwk", "jku", "x5u", "x5c", "x5t", "x5t#S256", "crit", "b64", "nonce", "enc", "zip",
		"ALG", "Kid", "X5T#s256", "", "\xff",
	} {
		_, err := jws.NewSigner(key, jws.Options{Header: map[string]any{name: "none"}})
		if !errors.Is(err, hsmkey.ErrConfig) {
			t.Errorf("extra header %q: %v, want ErrConfig", name, err)
		}
	}
}

func TestHeadersThatAreNoJSONAreRefusedBeforeGoJOSESeesThem(t *testing.T) {
	key := generate(t, openHSM(t), hsmkey.P256)
	cycle := map[string]any{}
	cycle["self"] = cycle
	for name, value := range map[string]any{
		"channel": make(chan int), "function": func() {}, "NaN": math.NaN(), "cycle": cycle, "complex": 1i,
		"broken":    json.RawMessage(`{"a":`),
		"duplicate": json.RawMessage(`{"a":1,"a":2}`),
		"marshaler": failing{},
	} {
		_, err := jws.NewSigner(key, jws.Options{Header: map[string]any{name: value}})
		if !errors.Is(err, hsmkey.ErrConfig) || !strings.Contains(err.Error(), name) {
			t.Errorf("header %s: %v, want ErrConfig that names it", name, err)
		}
	}
	for name, opts := range map[string]jws.Options{
		"typ": {Type: "\xff"}, "cty": {ContentType: "\xff"}, "kid": {KeyID: "\xff"},
	} {
		if _, err := jws.NewSigner(key, opts); !errors.Is(err, hsmkey.ErrConfig) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s that is not UTF-8: %v, want ErrConfig that names it", name, err)
		}
	}
}

// failing is a value that cannot be marshaled.
type failing struct{}

func (failing) MarshalJSON() ([]byte, error) { return nil, errors.New("no") }

func TestTheHeaderIsWrittenOnce(t *testing.T) {
	key := generate(t, openHSM(t), hsmkey.P256)
	nested := map[string]any{"a": 1}
	extra := map[string]any{"nested": nested}
	signer := newSigner(t, key, jws.Options{NoKeyID: true, Header: extra})
	nested["a"], extra["alg"] = 2, "none"
	const want = `{"alg":"ES256","nested":{"a":1}}`
	if got := headerOf(t, sign(t, signer, "{}")); got != want {
		t.Errorf("header %s, want %s", got, want)
	}
	object, err := signer.Jose().Sign([]byte("{}"))
	if err != nil {
		t.Fatal(err)
	}
	compact, err := object.CompactSerialize()
	if err != nil || headerOf(t, compact) != want {
		t.Errorf("header by Jose() %s, %v, want %s", headerOf(t, compact), err, want)
	}
}

func TestASignerRefusesWhatItsKeyCannotDo(t *testing.T) {
	hsm := openHSM(t)
	for typ, algs := range map[hsmkey.KeyType][]hsmkey.Algorithm{
		hsmkey.RSA2048: {hsmkey.ES256, hsmkey.HS256, hsmkey.EdDSA, "none", "RSA-OAEP", "rs256"},
		hsmkey.P256:    {hsmkey.ES384, hsmkey.RS256, hsmkey.EdDSA},
		hsmkey.Ed25519: {hsmkey.ES256, "Ed448"},
		hsmkey.HMAC256: {hsmkey.HS512, hsmkey.RS256},
	} {
		key := generate(t, hsm, typ)
		for _, alg := range algs {
			_, err := jws.NewSigner(key, jws.Options{Algorithm: alg})
			if !errors.Is(err, hsmkey.ErrUnsupported) || !strings.Contains(err.Error(), string(alg)) {
				t.Errorf("%s with %s: %v, want ErrUnsupported that names it", typ, alg, err)
			}
		}
	}
	key, err := hsm.Key(context.Background(), hsmkey.Query{Label: string(hsmkey.P256)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := jws.NewSigner(key, jws.Options{KeyID: "a", NoKeyID: true}); !errors.Is(err, hsmkey.ErrConfig) {
		t.Errorf("KeyID and NoKeyID: %v, want ErrConfig", err)
	}
	if _, err := jws.NewSigner(nil, jws.Options{}); !errors.Is(err, hsmkey.ErrConfig) {
		t.Errorf("no key: %v, want ErrConfig", err)
	}
	if _, err := newSigner(t, key, jws.Options{}).SignFormat(context.Background(), nil, 7); !errors.Is(err, hsmkey.ErrConfig) {
		t.Errorf("format 7: %v, want ErrConfig", err)
	}
}

func TestAnyPayloadIsSigned(t *testing.T) {
	key := generate(t, openHSM(t), hsmkey.P256)
	signer := newSigner(t, key, jws.Options{})
	verifier, err := jws.NewKeyVerifier(key, jws.VerifierOptions{Algorithms: key.Algorithms(), MaxSize: 8 << 20})
	if err != nil {
		t.Fatal(err)
	}
	for name, payload := range map[string]string{
		"empty": "", "binary": "\x00\xff\n", "large": strings.Repeat("x", 3<<20),
	} {
		for _, format := range []jws.Format{jws.Compact, jws.Flattened, jws.General} {
			token, err := signer.SignFormat(context.Background(), []byte(payload), format)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			verified, err := verifier.Verify(context.Background(), token)
			if err != nil || string(verified.Payload) != payload {
				t.Errorf("%s payload, %v: %v", name, format, err)
			}
		}
	}
}

func TestJoseFitsTheJWTBuilder(t *testing.T) {
	key := generate(t, openHSM(t), hsmkey.P256)
	signer := newSigner(t, key, jws.Options{Type: "JWT"})
	token, err := jwt.Signed(signer.Jose()).Claims(jwt.Claims{Issuer: "test"}).Claims(map[string]any{"admin": false}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	var claims map[string]any
	if err := parsed.Claims(key.Public(), &claims); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]any{"iss": "test", "admin": false}, claims); diff != "" {
		t.Error(diff)
	}
}

func TestACanceledContextSignsNothing(t *testing.T) {
	signer := newSigner(t, generate(t, openHSM(t), hsmkey.P256), jws.Options{})
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if token, err := signer.Sign(ctx, nil); !errors.Is(err, context.Canceled) || token != "" {
		t.Errorf("Sign = %q, %v, want context.Canceled", token, err)
	}
	if token, err := signer.SignFormat(ctx, nil, jws.General); !errors.Is(err, context.Canceled) || token != "" {
		t.Errorf("SignFormat = %q, %v, want context.Canceled", token, err)
	}
}

func TestOneSignerServesManyGoroutines(t *testing.T) {
	key := generate(t, openHSM(t), hsmkey.P256)
	signer := newSigner(t, key, jws.Options{})
	verifier, err := jws.NewKeyVerifier(key, jws.VerifierOptions{Algorithms: key.Algorithms()})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for i := range 20 {
				claims := map[string]int{"worker": worker, "i": i}
				token, err := signer.SignClaims(context.Background(), claims)
				if err != nil {
					t.Error(err)
					return
				}
				var got map[string]int
				if _, err := verifier.VerifyClaims(context.Background(), token, &got); err != nil || !cmp.Equal(got, claims) {
					t.Errorf("claims %v, %v, want %v", got, err, claims)
				}
			}
		})
	}
	wg.Wait()
}

func TestFormatsHaveNames(t *testing.T) {
	for _, format := range []jws.Format{jws.Compact, jws.Flattened, jws.General} {
		if got, err := jws.ParseFormat(format.String()); err != nil || got != format {
			t.Errorf("ParseFormat(%q) = %v, %v", format, got, err)
		}
	}
	for _, name := range []string{"", "general", "Compact", "jwt"} {
		if _, err := jws.ParseFormat(name); !errors.Is(err, hsmkey.ErrConfig) {
			t.Errorf("ParseFormat(%q) = %v, want ErrConfig", name, err)
		}
	}
}
