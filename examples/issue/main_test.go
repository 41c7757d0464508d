package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/jws"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// TestTheProgramIssuesAJWT runs the program as its comment says, with a key that
// this test made, and verifies what it prints.
func TestTheProgramIssuesAJWT(t *testing.T) {
	ctx := context.Background()
	token := testhsm.New(t)
	hsm, err := hsmkey.Open(ctx, hsmkey.Config{Pool: sessionpool.Config{
		Module: token.Module, TokenLabel: token.Labels[0], PIN: sessionpool.StaticPIN(testhsm.PIN),
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer hsm.Close(ctx)
	key, err := hsm.Generate(ctx, "issuer", hsmkey.P256, nil)
	if err != nil {
		t.Fatal(err)
	}

	program := filepath.Join(t.TempDir(), "issue")
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	cmd := exec.Command(program)
	cmd.Env = append(os.Environ(), token.Env()...)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("issue: %v", err)
	}

	verifier, err := jws.NewKeyVerifier(key, jws.VerifierOptions{
		Algorithms: []hsmkey.Algorithm{hsmkey.ES256},
		Expected:   jwt.Expected{Issuer: "https://issuer.example", Subject: "alice"},
	})
	if err != nil {
		t.Fatal(err)
	}
	var claims jwt.Claims
	verified, err := verifier.VerifyClaims(ctx, strings.TrimSpace(string(out)), &claims)
	if err != nil {
		t.Fatalf("%s: %v", out, err)
	}
	if verified.Header.Type != "JWT" || claims.Expiry == nil {
		t.Errorf("header %s, claims %+v", verified.Header.Raw, claims)
	}
}
