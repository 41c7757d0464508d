package main

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ThalesGroup/crypto11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/jwk"
	"github.com/hsmkey/hsmkey/jws"
)

// program builds the example, to be run in the environment that
// eval "$(hsmkey init)" makes: the PIN is in a file.
func program(t *testing.T, token *testhsm.HSM) *exec.Cmd {
	t.Helper()
	dir := t.TempDir()
	path, pin := filepath.Join(dir, "crypto11"), filepath.Join(dir, "pin")
	if err := os.WriteFile(pin, []byte(testhsm.PIN+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	cmd := exec.Command(path)
	cmd.Env = slices.DeleteFunc(append(os.Environ(), token.Env()...), func(pair string) bool {
		return strings.HasPrefix(pair, "HSM_PIN=")
	})
	cmd.Env = append(cmd.Env, "HSM_PIN_FILE="+pin)
	return cmd
}

// TestTheProgramSignsWithACrypto11Key runs the program as its comment says, with a
// key that crypto11 made, and verifies its tokens with the JWKS that it prints.
func TestTheProgramSignsWithACrypto11Key(t *testing.T) {
	token := testhsm.New(t)
	theirs, err := crypto11.Configure(&crypto11.Config{Path: token.Module, TokenLabel: token.Labels[0], Pin: testhsm.PIN})
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	if _, err := theirs.GenerateRSAKeyPairWithLabel([]byte{1}, []byte("issuer"), 2048); err != nil {
		t.Fatal(err)
	}

	out, err := program(t, token).Output()
	if err != nil {
		t.Fatalf("crypto11: %v", err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(lines) != 3 {
		t.Fatalf("it printed %d lines, want a JWKS and two tokens:\n%s", len(lines), out)
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
	out, err := program(t, testhsm.New(t)).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "issuer") {
		t.Errorf("%v, %s, want an error that names the key", err, out)
	}
}
