package jws_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/google/go-cmp/cmp"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jwk"
	"github.com/hsmkey/hsmkey/jws"
)

func b64(text string) string { return base64.RawURLEncoding.EncodeToString([]byte(text)) }

func keyVerifier(t *testing.T, key crypto.PublicKey, opts jws.VerifierOptions) *jws.Verifier {
	t.Helper()
	verifier, err := jws.NewKeyVerifier(key, opts)
	if err != nil {
		t.Fatal(err)
	}
	return verifier
}

func setVerifier(t *testing.T, keys []jwk.Key, algs ...hsmkey.Algorithm) *jws.Verifier {
	t.Helper()
	set, err := jwk.NewSet(keys...)
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := jws.NewVerifier(set, jws.VerifierOptions{Algorithms: algs})
	if err != nil {
		t.Fatal(err)
	}
	return verifier
}

func publicJWK(t *testing.T, key crypto.Signer, opts ...jwk.Option) jwk.Key {
	t.Helper()
	public, err := jwk.FromPublic(key.Public(), opts...)
	if err != nil {
		t.Fatal(err)
	}
	return public
}

func rejects(t *testing.T, verifier *jws.Verifier, token string, want error, words string) {
	t.Helper()
	verified, err := verifier.Verify(context.Background(), token)
	if verified != nil || !errors.Is(err, want) || !errors.Is(err, jws.ErrVerify) {
		t.Errorf("Verify(%.60q) = %v, %v, want %v", token, verified, err, want)
		return
	}
	if !strings.Contains(err.Error(), words) {
		t.Errorf("the error says %q, it should say %q", err, words)
	}
	if len(err.Error()) > 500 {
		t.Errorf("the error has %d bytes", len(err.Error()))
	}
}

func TestWhatIsNotTheSignedTokenDoesNotVerify(t *testing.T) {
	key := softwareKey[*ecdsa.PrivateKey]()
	token := sign(t, fromSigner(t, key, jws.Options{NoKeyID: true}), `{"sub":"joe"}`)
	p := strings.Split(token, ".")
	verifier := keyVerifier(t, key.Public(), jws.VerifierOptions{Algorithms: []hsmkey.Algorithm{hsmkey.ES256, hsmkey.EdDSA}})
	if _, err := verifier.Verify(context.Background(), token); err != nil {
		t.Fatal(err)
	}
	unsigned := func(header string) string { return b64(header) + "." + p[1] + "." }
	with := func(header string) string { return b64(header) + "." + p[1] + "." + p[2] }
	join := func(parts ...string) string { return strings.Join(parts, ".") }
	last := len(p[2]) - 1
	flipped := "A" + p[2][1:]
	if flipped == p[2] {
		flipped = "B" + p[2][1:]
	}

	for name, test := range map[string]struct {
		token string
		want  error
		words string
	}{
		"alg none":                {unsigned(`{"alg":"none"}`), jws.ErrVerify, `"none"`},
		"alg None, signed":        {with(`{"alg":"None"}`), jws.ErrVerify, `"None"`},
		"alg not on the list":     {with(`{"alg":"HS256"}`), jws.ErrVerify, "only ES256, EdDSA is allowed"},
		"alg of another key":      {with(`{"alg":"EdDSA"}`), jws.ErrVerify, "does not fit"},
		"a huge alg":              {with(`{"alg":"` + strings.Repeat("x", 1000) + `"}`), jws.ErrVerify, "xxx"},
		"another header":          {with(`{"alg":"ES256","typ":"JWT"}`), jws.ErrVerify, "altered"},
		"another payload":         {join(p[0], b64(`{"sub":"eve"}`), p[2]), jws.ErrVerify, "altered"},
		"another signature":       {join(p[0], p[1], flipped), jws.ErrVerify, "altered"},
		"no signature":            {join(p[0], p[1], ""), jws.ErrVerify, "altered"},
		"half a signature":        {join(p[0], p[1], p[2][:44]), jws.ErrVerify, "altered"},
		"a signature and a half":  {join(p[0], p[1], p[2]+"AAAA"), jws.ErrVerify, "altered"},
		"a signature of zeros":    {join(p[0], p[1], strings.Repeat("A", len(p[2]))), jws.ErrVerify, "altered"},
		"a header of line breaks": {join(p[0]+"\n", p[1], p[2]), jws.ErrMalformed, "line break"},
		"a broken signature":      {join(p[0], p[1], p[2]+"\r\n"), jws.ErrMalformed, "line break"},
		"stray bits":              {join(p[0], p[1], p[2][:last]+string(p[2][last]+1)), jws.ErrMalformed, "base64url"},
		"padding":                 {token + "==", jws.ErrMalformed, "base64url"},
		"standard base64":         {join(p[0], p[1], "+/"+p[2][2:]), jws.ErrMalformed, "base64url"},
		"blanks before":           {" " + token, jws.ErrMalformed, "base64url"},
		"two parts":               {join(p[0], p[1]), jws.ErrMalformed, "2 parts"},
		"four parts":              {token + ".", jws.ErrMalformed, "4 parts"},
		"five parts":              {token + ".a.b", jws.ErrMalformed, "5 parts"},
		"nothing":                 {"", jws.ErrMalformed, "1 parts"},
		"dots":                    {"..", jws.ErrMalformed, "header cannot be read"},
		"garbage":                 {"\x00\xff\xfe{}", jws.ErrMalformed, ""},
		"a JWE":                   {"a.b.c.d.e", jws.ErrMalformed, "5 parts"},
		"a huge token":            {strings.Repeat("A", jws.DefaultMaxSize+1), jws.ErrMalformed, "at most"},
		"a header without alg":    {with(`{}`), jws.ErrMalformed, `no "alg"`},
		"an alg that is a number": {with(`{"alg":256}`), jws.ErrMalformed, `"alg"`},
		"an alg that is null":     {with(`{"alg":null}`), jws.ErrMalformed, `"alg"`},
		"two algs":                {with(`{"alg":"none","alg":"ES256"}`), jws.ErrMalformed, "header"},
		"ALG":                     {with(`{"ALG":"ES256"}`), jws.ErrMalformed, `no "alg"`},
		"a kid that is a list":    {with(`{"alg":"ES256","kid":["a"]}`), jws.ErrMalformed, `"kid"`},
		"a header in an array":    {with(`[{"alg":"ES256"}]`), jws.ErrMalformed, "header"},
		"a header that is null":   {with(`null`), jws.ErrMalformed, `no "alg"`},
		"a header, twice":         {with(`{"alg":"ES256"}{}`), jws.ErrMalformed, "header cannot be read"},
		"crit":                    {with(`{"alg":"ES256","crit":["exp"],"exp":1}`), jws.ErrMalformed, `"crit"`},
		"an empty crit":           {with(`{"alg":"ES256","crit":[]}`), jws.ErrMalformed, `"crit"`},
		"an unencoded payload":    {with(`{"alg":"ES256","b64":false}`), jws.ErrMalformed, `"b64"`},
		"a private key in jwk":    {with(`{"alg":"ES256","jwk":{"kty":"oct","k":"AQ"}}`), jws.ErrMalformed, "private"},
		"a deep header":           {with(`{"alg":"ES256","a":` + strings.Repeat("[", 20000) + strings.Repeat("]", 20000) + `}`), jws.ErrMalformed, "header cannot be read"},
	} {
		t.Run(name, func(t *testing.T) { rejects(t, verifier, test.token, test.want, test.words) })
	}
	for i := range len(token) - 1 {
		truncated := token[:i]
		if _, err := verifier.Verify(context.Background(), truncated); !errors.Is(err, jws.ErrVerify) {
			t.Fatalf("the first %d bytes: %v, want ErrVerify", i, err)
		}
	}
}

func TestTokensOfOtherKeysDoNotVerify(t *testing.T) {
	for i, signing := range softwareKeys() {
		for j, verifying := range softwareKeys() {
			if i == j {
				continue
			}
			signer := fromSigner(t, signing, jws.Options{})
			token := sign(t, signer, "{}")
			algs := algorithmsOf(t, verifying.Public())
			rejects(t, keyVerifier(t, verifying.Public(), jws.VerifierOptions{Algorithms: algs}), token, jws.ErrVerify, "only")
			// Even where the algorithm is allowed, it must fit the key.
			both := append(algs, signer.Algorithm())
			rejects(t, keyVerifier(t, verifying.Public(), jws.VerifierOptions{Algorithms: both}), token, jws.ErrVerify, "")
		}
	}
}

// TestAPublicKeyIsNoSecret: a verifier that takes the algorithm from the token
// computes a MAC with the public key, which everybody has.
func TestAPublicKeyIsNoSecret(t *testing.T) {
	key := softwareKey[*rsa.PrivateKey]()
	hsm := openHSM(t)
	secret := importKey(t, hsm, "the public key as a secret", key.N.Bytes())
	forged := sign(t, newSigner(t, secret, jws.Options{Algorithm: hsmkey.HS256, NoKeyID: true}), "{}")
	verifier := keyVerifier(t, key.Public(), jws.VerifierOptions{Algorithms: []hsmkey.Algorithm{hsmkey.RS256, hsmkey.HS256}})
	rejects(t, verifier, forged, jws.ErrVerify, "does not fit")
}

func TestAMACIsVerifiedOnTheHSM(t *testing.T) {
	hsm := openHSM(t)
	key, wrong := generate(t, hsm, hsmkey.HMAC256), generate(t, hsm, hsmkey.HMAC512)
	token := sign(t, newSigner(t, key, jws.Options{}), `{"sub":"joe"}`)
	opts := jws.VerifierOptions{Algorithms: []hsmkey.Algorithm{hsmkey.HS256}}
	verifier := keyVerifier(t, key, opts)
	verified, err := verifier.Verify(context.Background(), token)
	if err != nil || string(verified.Payload) != `{"sub":"joe"}` {
		t.Fatalf("Verify = %v, %v", verified, err)
	}
	rejects(t, verifier, token[:len(token)-4]+"AAAA", jws.ErrVerify, "altered")
	rejects(t, keyVerifier(t, wrong, opts), token, jws.ErrVerify, "altered")

	// What is not the token's fault is not blamed on it.
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := verifier.Verify(ctx, token); !errors.Is(err, context.Canceled) || errors.Is(err, jws.ErrVerify) {
		t.Errorf("a canceled context: %v, want context.Canceled and not ErrVerify", err)
	}
	if err := hsm.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := verifier.Verify(context.Background(), token); !errors.Is(err, hsmkey.ErrClosed) || errors.Is(err, jws.ErrVerify) {
		t.Errorf("a closed HSM: %v, want ErrClosed and not ErrVerify", err)
	}
}

func TestTheKidChoosesTheKey(t *testing.T) {
	rsaKey, ecKey := softwareKey[*rsa.PrivateKey](), softwareKey[*ecdsa.PrivateKey]()
	ed := softwareKey[ed25519.PrivateKey]()
	verifier := setVerifier(t, []jwk.Key{publicJWK(t, rsaKey), publicJWK(t, ecKey)}, hsmkey.RS256, hsmkey.ES256, hsmkey.EdDSA)
	accepts := func(verifier *jws.Verifier, key crypto.Signer, opts jws.Options) {
		t.Helper()
		token := sign(t, fromSigner(t, key, opts), "{}")
		if _, err := verifier.Verify(context.Background(), token); err != nil {
			t.Errorf("a token of %T with %+v: %v", key, opts, err)
		}
	}
	token := func(key crypto.Signer, opts jws.Options) string { return sign(t, fromSigner(t, key, opts), "{}") }

	accepts(verifier, rsaKey, jws.Options{})
	accepts(verifier, ecKey, jws.Options{})
	accepts(verifier, ecKey, jws.Options{NoKeyID: true})
	rejects(t, verifier, token(ecKey, jws.Options{KeyID: "unknown"}), jws.ErrVerify, `"unknown"`)
	rejects(t, verifier, token(ecKey, jws.Options{KeyID: publicJWK(t, rsaKey).KeyID()}), jws.ErrVerify, "does not fit")
	rejects(t, verifier, token(ed, jws.Options{NoKeyID: true}), jws.ErrVerify, "does not fit")
	rejects(t, verifier, token(ed, jws.Options{KeyID: strings.Repeat("k", 10000)}), jws.ErrVerify, "kkk")

	// A key without kid stands for any.
	bare := setVerifier(t, []jwk.Key{publicJWK(t, ecKey, jwk.WithKeyID(""))}, hsmkey.ES256)
	accepts(bare, ecKey, jws.Options{KeyID: "unknown"})
	// A key given alone is used whatever the kid.
	accepts(keyVerifier(t, ecKey.Public(), jws.VerifierOptions{Algorithms: []hsmkey.Algorithm{hsmkey.ES256}}), ecKey, jws.Options{KeyID: "other"})
	// Several keys with one kid, as others publish them, are tried in turn.
	same := func(key crypto.Signer) string {
		out, _ := json.Marshal(publicJWK(t, key, jwk.WithKeyID("same")))
		return string(out)
	}
	set, err := jwk.ParseSet([]byte(`{"keys":[` + same(rsaKey) + `,` + same(ecKey) + `]}`))
	if err != nil {
		t.Fatal(err)
	}
	twins, err := jws.NewVerifier(set, jws.VerifierOptions{Algorithms: []hsmkey.Algorithm{hsmkey.ES256, hsmkey.RS256}})
	if err != nil {
		t.Fatal(err)
	}
	accepts(twins, ecKey, jws.Options{KeyID: "same"})
	accepts(twins, rsaKey, jws.Options{KeyID: "same"})
}

func TestTheAlgorithmOfAJWKIsObeyed(t *testing.T) {
	key := softwareKey[*rsa.PrivateKey]()
	verifier := setVerifier(t, []jwk.Key{publicJWK(t, key, jwk.WithAlgorithm(hsmkey.PS256))}, hsmkey.RS256, hsmkey.PS256)
	if _, err := verifier.Verify(context.Background(), sign(t, fromSigner(t, key, jws.Options{Algorithm: hsmkey.PS256}), "{}")); err != nil {
		t.Errorf("PS256: %v", err)
	}
	rejects(t, verifier, sign(t, fromSigner(t, key, jws.Options{Algorithm: hsmkey.RS256}), "{}"), jws.ErrVerify, "does not fit")
}

func TestAVerifierThatCanVerifyNothingIsRefused(t *testing.T) {
	key := softwareKey[*ecdsa.PrivateKey]()
	es256 := []hsmkey.Algorithm{hsmkey.ES256}
	for name, opts := range map[string]jws.VerifierOptions{
		"no algorithms":      {},
		"alg none":           {Algorithms: []hsmkey.Algorithm{hsmkey.ES256, "none"}},
		"an unknown alg":     {Algorithms: []hsmkey.Algorithm{"RSA-OAEP"}},
		"a negative MaxSize": {Algorithms: es256, MaxSize: -1},
	} {
		if _, err := jws.NewKeyVerifier(key.Public(), opts); !errors.Is(err, hsmkey.ErrConfig) {
			t.Errorf("%s: %v, want ErrConfig", name, err)
		}
	}
	if _, err := jws.NewKeyVerifier(key.Public(), jws.VerifierOptions{}); err == nil || !strings.Contains(err.Error(), "list of algorithms") {
		t.Errorf("no algorithms: %v, want an error that asks for them", err)
	}
	rs256 := []hsmkey.Algorithm{hsmkey.RS256}
	if _, err := jws.NewKeyVerifier(key.Public(), jws.VerifierOptions{Algorithms: rs256}); !errors.Is(err, hsmkey.ErrUnsupported) {
		t.Errorf("alg of other keys: %v, want ErrUnsupported", err)
	}
	if _, err := jws.NewVerifier(jwk.Set{}, jws.VerifierOptions{Algorithms: es256}); !errors.Is(err, hsmkey.ErrUnsupported) {
		t.Errorf("an empty set: %v, want ErrUnsupported", err)
	}
	if _, err := jws.NewKeyVerifier(key, jws.VerifierOptions{Algorithms: es256}); !errors.Is(err, jwk.ErrPrivate) {
		t.Errorf("a private key: %v, want jwk.ErrPrivate", err)
	}
	for name, pub := range map[string]crypto.PublicKey{"nil": nil, "a nil HSM key": (*hsmkey.HSMJWK)(nil), "a string": "key"} {
		if _, err := jws.NewKeyVerifier(pub, jws.VerifierOptions{Algorithms: es256}); err == nil {
			t.Errorf("%s is accepted as a key", name)
		}
	}
}

func TestJSONTokensAreTakenApartStrictly(t *testing.T) {
	key := softwareKey[*ecdsa.PrivateKey]()
	compact := sign(t, fromSigner(t, key, jws.Options{NoKeyID: true}), `{"sub":"joe"}`)
	p := strings.Split(compact, ".")
	verifier := keyVerifier(t, key.Public(), jws.VerifierOptions{Algorithms: []hsmkey.Algorithm{hsmkey.ES256}})
	payload, protected, signature := `"payload":"`+p[1]+`"`, `"protected":"`+p[0]+`"`, `"signature":"`+p[2]+`"`
	good := "{" + protected + "," + signature + "}"
	object := func(members ...string) string { return "{" + strings.Join(members, ",") + "}" }
	list := func(signatures ...string) string {
		return object(payload, `"signatures":[`+strings.Join(signatures, ",")+`]`)
	}
	other := object(`"protected":"`+b64(`{"alg":"RS256"}`)+`"`, signature)
	broken := object(protected, `"signature":"`+strings.Repeat("A", len(p[2]))+`"`)

	for name, token := range map[string]string{
		"flattened":                   object(payload, protected, signature),
		"in another order, spaced":    "{ " + signature + " ,\n" + payload + "," + protected + " }\n",
		"with an unprotected header":  object(payload, protected, signature, `"header":{"kid":"x","alg":"none"}`),
		"with members nobody knows":   object(payload, protected, signature, `"extra":[1]`),
		"general":                     list(good),
		"with a signature of another": list(other, good),
		"with a broken signature":     list(broken, good),
	} {
		verified, err := verifier.Verify(context.Background(), token)
		if err != nil || string(verified.Payload) != `{"sub":"joe"}` || string(verified.Header.Raw) != `{"alg":"ES256"}` {
			t.Errorf("%s: %v, %v", name, verified, err)
		}
	}
	for name, token := range map[string]string{
		"no payload":            object(protected, signature),
		"no protected header":   object(payload, signature, `"header":{"alg":"ES256"}`),
		"no signature":          object(payload, protected),
		"no signatures":         list(),
		"both forms":            object(payload, protected, signature, `"signatures":[`+good+`]`),
		"a payload twice":       object(payload, payload, protected, signature),
		"a payload of numbers":  object(`"payload":[1]`, protected, signature),
		"null":                  object(`"payload":null`, protected, signature),
		"PAYLOAD":               object(`"PAYLOAD":"`+p[1]+`"`, protected, signature),
		"a dot in the payload":  object(`"payload":"`+p[1]+`."`, protected, signature),
		"an unprotected crit":   object(payload, protected, signature, `"header":{"crit":["exp"]}`),
		"a header of text":      object(payload, protected, signature, `"header":"x"`),
		"one of two malformed":  list(good, `{}`),
		"too many":              list(strings.Split(strings.Repeat(good+" ", 33)[:33*(len(good)+1)-1], " ")...),
		"not closed":            object(payload, protected, signature)[:50],
		"followed by something": object(payload, protected, signature) + "x",
		"deeply nested":         object(payload, protected, signature, `"a":`+strings.Repeat("[", 20000)+strings.Repeat("]", 20000)),
		"an empty object":       `{}`,
	} {
		t.Run(name, func(t *testing.T) { rejects(t, verifier, token, jws.ErrMalformed, "malformed") })
	}
	rejects(t, verifier, list(broken, other), jws.ErrVerify, "altered")
}

func TestClaimsAreCheckedAgainstTheClock(t *testing.T) {
	key := softwareKey[ed25519.PrivateKey]()
	signer := fromSigner(t, key, jws.Options{Type: "JWT"})
	now := time.Unix(1_700_000_000, 0)
	at := func(offset time.Duration) int64 { return now.Add(offset).Unix() }
	for name, test := range map[string]struct {
		claims string
		leeway time.Duration
		want   error
	}{
		"no times":                  {`{}`, 0, nil},
		"valid":                     {fmt.Sprintf(`{"iat":%d,"nbf":%d,"exp":%d}`, at(-1), at(-1), at(1)), -1, nil},
		"expired":                   {fmt.Sprintf(`{"exp":%d}`, at(-61*time.Second)), 0, jwt.ErrExpired},
		"expired within a minute":   {fmt.Sprintf(`{"exp":%d}`, at(-59*time.Second)), 0, nil},
		"expired, no leeway":        {fmt.Sprintf(`{"exp":%d}`, at(-time.Second)), -1, jwt.ErrExpired},
		"expired, more leeway":      {fmt.Sprintf(`{"exp":%d}`, at(-time.Hour)), 2 * time.Hour, nil},
		"too early":                 {fmt.Sprintf(`{"nbf":%d}`, at(61*time.Second)), 0, jwt.ErrNotValidYet},
		"early within a minute":     {fmt.Sprintf(`{"nbf":%d}`, at(59*time.Second)), 0, nil},
		"issued in the future":      {fmt.Sprintf(`{"iat":%d}`, at(time.Hour)), 0, jwt.ErrIssuedInTheFuture},
		"exp is text":               {`{"exp":"tomorrow"}`, 0, jws.ErrVerify},
		"exp is out of any range":   {`{"exp":1e300}`, 0, jws.ErrVerify},
		"exp twice":                 {`{"exp":1,"exp":99999999999}`, 0, jws.ErrVerify},
		"EXP is not exp":            {`{"EXP":1}`, 0, nil},
		"a payload that is no JSON": {`exp`, 0, jws.ErrVerify},
		"an array":                  {`[1]`, 0, jws.ErrVerify},
		"null":                      {`null`, 0, jws.ErrVerify},
		"claims that are not UTF-8": {"{\"sub\":\"\xff\"}", 0, jws.ErrVerify},
		"aud is a number":           {`{"aud":1}`, 0, jws.ErrVerify},
	} {
		t.Run(name, func(t *testing.T) {
			verifier := keyVerifier(t, key.Public(), jws.VerifierOptions{
				Algorithms: []hsmkey.Algorithm{hsmkey.EdDSA}, Leeway: test.leeway, Expected: jwt.Expected{Time: now},
			})
			token := sign(t, signer, test.claims)
			verified, err := verifier.VerifyClaims(context.Background(), token, nil)
			if !errors.Is(err, test.want) || (err == nil) != (test.want == nil) {
				t.Errorf("VerifyClaims = %v, want %v", err, test.want)
			}
			if err != nil && (!errors.Is(err, jws.ErrVerify) || verified != nil || strings.Contains(err.Error(), "jose")) {
				t.Errorf("VerifyClaims = %v, %v, want no token and ErrVerify, in our words", verified, err)
			}
		})
	}
}

func TestClaimsMustBeTheExpectedOnes(t *testing.T) {
	key := softwareKey[ed25519.PrivateKey]()
	token := sign(t, fromSigner(t, key, jws.Options{}), `{"iss":"a","sub":"b","aud":["c","d"],"jti":"e","n":12345678901234567890}`)
	for _, test := range []struct {
		expected jwt.Expected
		want     error
	}{
		{jwt.Expected{}, nil},
		{jwt.Expected{Issuer: "a", Subject: "b", AnyAudience: jwt.Audience{"x", "d"}, ID: "e"}, nil},
		{jwt.Expected{Issuer: "x"}, jwt.ErrInvalidIssuer},
		{jwt.Expected{Subject: "x"}, jwt.ErrInvalidSubject},
		{jwt.Expected{AnyAudience: jwt.Audience{"x"}}, jwt.ErrInvalidAudience},
		{jwt.Expected{ID: "x"}, jwt.ErrInvalidID},
	} {
		verifier := keyVerifier(t, key.Public(), jws.VerifierOptions{Algorithms: []hsmkey.Algorithm{hsmkey.EdDSA}, Expected: test.expected})
		var claims struct {
			jwt.Claims
			N uint64 `json:"n"`
		}
		_, err := verifier.VerifyClaims(context.Background(), token, &claims)
		if !errors.Is(err, test.want) || (err == nil) != (test.want == nil) {
			t.Errorf("%+v: %v, want %v", test.expected, err, test.want)
		}
		if err != nil && (!errors.Is(err, jws.ErrVerify) || strings.Contains(err.Error(), "jose")) {
			t.Errorf("%+v: %v, want ErrVerify, in our words", test.expected, err)
		}
		if err == nil && (claims.N != 12345678901234567890 || claims.Subject != "b") {
			t.Errorf("claims %+v", claims)
		}
	}
	var unfit struct {
		Issuer int `json:"iss"`
	}
	verifier := keyVerifier(t, key.Public(), jws.VerifierOptions{Algorithms: []hsmkey.Algorithm{hsmkey.EdDSA}})
	if _, err := verifier.VerifyClaims(context.Background(), token, &unfit); !errors.Is(err, jws.ErrVerify) {
		t.Errorf("claims that do not fit: %v, want ErrVerify", err)
	}
}

func TestTheHeaderIsHandedOut(t *testing.T) {
	key := softwareKey[ed25519.PrivateKey]()
	token := sign(t, fromSigner(t, key, jws.Options{KeyID: "k", Type: "at+jwt", ContentType: "json", Header: map[string]any{"x": 1}}), "{}")
	verified, err := keyVerifier(t, key.Public(), jws.VerifierOptions{Algorithms: []hsmkey.Algorithm{hsmkey.EdDSA}}).Verify(context.Background(), token)
	if err != nil {
		t.Fatal(err)
	}
	want := jws.Header{Algorithm: hsmkey.EdDSA, KeyID: "k", Type: "at+jwt", ContentType: "json", Raw: json.RawMessage(`{"alg":"EdDSA","cty":"json","kid":"k","typ":"at+jwt","x":1}`)}
	if diff := cmp.Diff(want, verified.Header); diff != "" {
		t.Error(diff)
	}
}

// FuzzVerify feeds the verifier with tokens that nobody signed. Of the seeds only
// the signed ones verify, and whatever verifies is what was signed.
func FuzzVerify(f *testing.F) {
	key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	signer, err := jws.FromSigner(key, jws.Options{KeyID: "k", Type: "JWT"})
	if err != nil {
		f.Fatal(err)
	}
	const payload = `{"sub":"joe","exp":99999999999}`
	var header string
	for _, format := range []jws.Format{jws.Compact, jws.Flattened, jws.General} {
		token, err := signer.SignFormat(context.Background(), []byte(payload), format)
		if err != nil {
			f.Fatal(err)
		}
		if format == jws.Compact {
			header, _, _ = strings.Cut(token, ".")
		}
		f.Add(token)
	}
	f.Add("e30.e30.")
	f.Add(b64(`{"alg":"none"}`) + "." + b64(payload) + ".")
	f.Add(`{"payload":"","signatures":[{"protected":"","header":{"crit":[]},"signature":""}]}`)
	verifier, err := jws.NewKeyVerifier(key.Public(), jws.VerifierOptions{Algorithms: []hsmkey.Algorithm{hsmkey.EdDSA}, MaxSize: 1 << 16})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, token string) {
		verified, err := verifier.VerifyClaims(context.Background(), token, nil)
		if err != nil {
			if !errors.Is(err, jws.ErrVerify) || verified != nil {
				t.Fatalf("VerifyClaims = %v, %v, want no token and ErrVerify", verified, err)
			}
			return
		}
		if string(verified.Payload) != payload || b64(string(verified.Header.Raw)) != header {
			t.Fatalf("a forgery verifies: %s %s", verified.Header.Raw, verified.Payload)
		}
	})
}
