package jws_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jwk"
	"github.com/hsmkey/hsmkey/jws"
)

// proof is a token of ours with what another program needs to verify it.
type proof struct {
	Name    string          `json:"name"`
	Alg     string          `json:"alg"`
	JWK     json.RawMessage `json:"jwk"`
	Token   string          `json:"token"`
	Payload string          `json:"payload"` // base64url
}

// TestEveryAlgorithmIsVerifiedByOtherPrograms signs with every algorithm in every
// format and lets go-jose, José and jwcrypto verify with the JWK that we publish.
func TestEveryAlgorithmIsVerifiedByOtherPrograms(t *testing.T) {
	var proofs []proof
	hsm := openHSM(t)
	for _, typ := range []hsmkey.KeyType{hsmkey.RSA2048, hsmkey.P256, hsmkey.P384, hsmkey.P521, hsmkey.Ed25519} {
		key := generate(t, hsm, typ)
		public, err := jwk.Public(key, jwk.WithAlgorithm(""))
		if err != nil {
			t.Fatal(err)
		}
		proofs = append(proofs, prove(t, key, public)...)
	}
	// The secret is imported, because verifiers of a MAC must know it.
	secret := []byte(strings.Repeat("0123456789abcdef", 4))
	proofs = append(proofs, prove(t, importKey(t, hsm, "secret", secret), jose.JSONWebKey{Key: secret})...)

	verifyWithGoJOSE(t, proofs)
	verifyWithJose(t, proofs)
	verifyWithJwcrypto(t, proofs)
	verifySaltLength(t, proofs)
}

// prove signs with all algorithms of the key in all formats.
func prove(t *testing.T, key *hsmkey.HSMJWK, public json.Marshaler) []proof {
	t.Helper()
	marshaled, err := public.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	var proofs []proof
	for _, alg := range key.Algorithms() {
		signer, err := jws.NewSigner(key, jws.Options{Algorithm: alg, Type: "JWT", Header: map[string]any{"org": "Ærø & <sons>"}})
		if err != nil {
			t.Fatal(err)
		}
		for _, format := range []jws.Format{jws.Compact, jws.Flattened, jws.General} {
			name := string(alg) + " " + format.String()
			payload := []byte(`{"iss":"test","name":"` + name + `"}`)
			token, err := signer.SignFormat(context.Background(), payload, format)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			proofs = append(proofs, proof{name, string(alg), marshaled, token, base64.RawURLEncoding.EncodeToString(payload)})
		}
	}
	return proofs
}

func verifyWithGoJOSE(t *testing.T, proofs []proof) {
	for _, p := range proofs {
		var key jose.JSONWebKey
		if err := json.Unmarshal(p.JWK, &key); err != nil {
			t.Fatal(err)
		}
		parse := jose.ParseSignedCompact
		if strings.HasPrefix(p.Token, "{") {
			parse = jose.ParseSignedJSON
		}
		token, err := parse(p.Token, []jose.SignatureAlgorithm{jose.SignatureAlgorithm(p.Alg)})
		if err != nil {
			t.Errorf("%s: go-jose: %v", p.Name, err)
			continue
		}
		payload, err := token.Verify(key)
		if got := base64.RawURLEncoding.EncodeToString(payload); err != nil || got != p.Payload {
			t.Errorf("%s: go-jose: payload %q, %v", p.Name, got, err)
		}
	}
}

// verifyWithJose runs `jose jws ver`, once for each token.
func verifyWithJose(t *testing.T, proofs []proof) {
	program, err := exec.LookPath("jose")
	if err != nil {
		t.Fatal("jose not found: install the Debian package jose (or run `make deps`)")
	}
	known, err := exec.Command(program, "alg", "--kind", "sign").Output()
	if err != nil {
		t.Fatalf("jose alg: %v", err)
	}
	algorithms := strings.Fields(string(known))
	verified := make(map[string]bool)
	file := filepath.Join(t.TempDir(), "key.jwk")
	for _, p := range proofs {
		if !slices.Contains(algorithms, p.Alg) {
			continue
		}
		if err := os.WriteFile(file, p.JWK, 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(program, "jws", "ver", "-i-", "-k", file, "-O-")
		cmd.Stdin = strings.NewReader(p.Token)
		payload, err := cmd.Output()
		if got := base64.RawURLEncoding.EncodeToString(payload); err != nil || got != p.Payload {
			t.Errorf("%s: jose jws ver: payload %q, %v", p.Name, payload, err)
		}
		verified[p.Alg] = true
	}
	if len(verified) != 12 {
		t.Errorf("José verified %v, want all but EdDSA, which it does not know", verified)
	}
}

// verifyWithJwcrypto runs testdata/verify.py, once for all tokens.
func verifyWithJwcrypto(t *testing.T, proofs []proof) {
	input, err := json.Marshal(proofs)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(python(t), filepath.Join("testdata", "verify.py"))
	cmd.Stdin = bytes.NewReader(input)
	out, err := cmd.CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != strconv.Itoa(len(proofs)) {
		t.Errorf("jwcrypto did not verify all %d tokens: %v\n%s", len(proofs), err, out)
	}
}

// python returns a Python interpreter that has jwcrypto.
func python(t *testing.T) string {
	for _, name := range []string{"python3", "/usr/bin/python3"} {
		if exec.Command(name, "-c", "import jwcrypto").Run() == nil {
			return name
		}
	}
	t.Fatal("no Python with jwcrypto: install the Debian package python3-jwcrypto (or run `make deps`)")
	return ""
}

// verifySaltLength rejects PSS signatures whose salt is not exactly as long as the
// hash (RFC 7518, section 3.5). Other verifiers take any length.
func verifySaltLength(t *testing.T, proofs []proof) {
	hashes := map[string]crypto.Hash{"PS256": crypto.SHA256, "PS384": crypto.SHA384, "PS512": crypto.SHA512}
	checked := 0
	for _, p := range proofs {
		hash, isPSS := hashes[p.Alg]
		if !isPSS || strings.HasPrefix(p.Token, "{") {
			continue
		}
		var key jose.JSONWebKey
		if err := json.Unmarshal(p.JWK, &key); err != nil {
			t.Fatal(err)
		}
		if err := verifyPSS(key.Key, hash, p.Token); err != nil {
			t.Errorf("%s: the salt is not as long as the hash: %v", p.Name, err)
		}
		checked++
	}
	if checked != len(hashes) {
		t.Errorf("%d PSS tokens checked, want %d", checked, len(hashes))
	}
}

func verifyPSS(key crypto.PublicKey, hash crypto.Hash, token string) error {
	dot := strings.LastIndexByte(token, '.')
	signature, err := base64.RawURLEncoding.DecodeString(token[dot+1:])
	if err != nil {
		return err
	}
	h := hash.New()
	h.Write([]byte(token[:dot]))
	pub, ok := key.(*rsa.PublicKey)
	if !ok {
		return fmt.Errorf("a %T is no RSA key", key)
	}
	return rsa.VerifyPSS(pub, hash, h.Sum(nil), signature,
		&rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: hash})
}
