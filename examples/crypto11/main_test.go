package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"strings"
	"testing"

	"github.com/ThalesGroup/crypto11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/jwk"
	"github.com/hsmkey/hsmkey/jws"
)

// TestACrypto11KeySigns runs the example with a key that crypto11 made, and
// verifies its tokens with the JWKS that it prints.
func TestACrypto11KeySigns(t *testing.T) {
	token := testhsm.New(t)
	config := func() *crypto11.Config {
		return &crypto11.Config{Path: token.Module, TokenLabel: token.Labels[0], Pin: testhsm.PIN}
	}
	theirs, err := crypto11.Configure(config())
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	if _, err := theirs.GenerateRSAKeyPairWithLabel([]byte{1}, []byte("issuer"), 2048); err != nil {
		t.Fatal(err)
	}

	var out bytes.Buffer
	if err := run(&out, config()); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 3 {
		t.Fatalf("it printed %d lines, want a JWKS and two tokens:\n%s", len(lines), &out)
	}
	keys, err := jwk.ParseSet([]byte(lines[0]))
	if err != nil {
		t.Fatal(err)
	}
	for i, alg := range []hsmkey.Algorithm{hsmkey.RS256, hsmkey.PS256} {
		verifier, err := jws.NewVerifier(keys, jws.VerifierOptions{Algorithms: []hsmkey.Algorithm{alg}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := verifier.VerifyClaims(context.Background(), lines[1+i], nil); err != nil {
			t.Errorf("%s: %v", alg, err)
		}
	}

	// The salt of PS256 is exactly as long as the hash.
	signed := lines[2][:strings.LastIndexByte(lines[2], '.')]
	signature, err := base64.RawURLEncoding.DecodeString(lines[2][len(signed)+1:])
	if err != nil {
		t.Fatal(err)
	}
	pub, ok := keys.Keys()[0].PublicKey().(*rsa.PublicKey)
	if !ok {
		t.Fatalf("the JWKS has a %T", keys.Keys()[0].PublicKey())
	}
	digest := sha256.Sum256([]byte(signed))
	if err := rsa.VerifyPSS(pub, crypto.SHA256, digest[:], signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}); err != nil {
		t.Errorf("the salt of PS256: %v", err)
	}
}

func TestAMissingKeyIsReported(t *testing.T) {
	token := testhsm.New(t)
	err := run(&bytes.Buffer{}, &crypto11.Config{Path: token.Module, TokenLabel: token.Labels[0], Pin: testhsm.PIN})
	if err == nil || !strings.Contains(err.Error(), "issuer") {
		t.Errorf("run = %v, want an error that names the key", err)
	}
}
