package jws_test

import (
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log"

	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jwk"
	"github.com/hsmkey/hsmkey/jws"
)

// A JWT is signed by a key in the HSM that the environment names, and verified
// with the public key alone.
func Example() {
	ctx := context.Background()
	config, err := hsmkey.FromEnv()
	if err != nil {
		log.Fatal(err)
	}
	hsm, err := hsmkey.Open(ctx, config)
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = hsm.Close(ctx) }()

	key, err := hsm.Key(ctx, hsmkey.Query{Label: "issuer"})
	if err != nil {
		log.Fatal(err)
	}
	signer, err := jws.NewSigner(key, jws.Options{Type: "JWT"})
	if err != nil {
		log.Fatal(err)
	}
	token, err := signer.SignClaims(ctx, jwt.Claims{Issuer: "https://issuer.example", Subject: "alice"})
	if err != nil {
		log.Fatal(err)
	}

	// Elsewhere, with the JWKS that the issuer publishes:
	public, err := jwk.Public(key)
	if err != nil {
		log.Fatal(err)
	}
	keys, err := jwk.NewSet(public)
	if err != nil {
		log.Fatal(err)
	}
	verifier, err := jws.NewVerifier(keys, jws.VerifierOptions{Algorithms: []hsmkey.Algorithm{hsmkey.ES256}})
	if err != nil {
		log.Fatal(err)
	}
	var claims jwt.Claims
	verified, err := verifier.VerifyClaims(ctx, token, &claims)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(verified.Header.Algorithm, verified.Header.Type, claims.Subject)
	// Output: ES256 JWT alice
}

// rfc8037 returns the key of RFC 8037, appendix A, in memory: an Ed25519 key
// always gives the same signature, so that its tokens can be shown.
func rfc8037() ed25519.PrivateKey {
	seed, err := base64.RawURLEncoding.DecodeString("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A")
	if err != nil {
		log.Fatal(err)
	}
	return ed25519.NewKeyFromSeed(seed)
}

// Any crypto.Signer will do, a key of crypto11 for instance.
func ExampleFromSigner() {
	signer, err := jws.FromSigner(rfc8037(), jws.Options{NoKeyID: true})
	if err != nil {
		log.Fatal(err)
	}
	token, err := signer.Sign(context.Background(), []byte("Example of Ed25519 signing"))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(token)
	// Output: eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc.hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg
}

func ExampleSigner_SignFormat() {
	signer, err := jws.FromSigner(rfc8037(), jws.Options{NoKeyID: true})
	if err != nil {
		log.Fatal(err)
	}
	token, err := signer.SignFormat(context.Background(), []byte("Example of Ed25519 signing"), jws.Flattened)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(token)
	// Output: {"payload":"RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc","protected":"eyJhbGciOiJFZERTQSJ9","signature":"hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg"}
}

// Jose is for what go-jose's API offers beyond ours, here a builder that merges
// claims.
func ExampleSigner_Jose() {
	signer, err := jws.FromSigner(rfc8037(), jws.Options{KeyID: "2026-1"})
	if err != nil {
		log.Fatal(err)
	}
	token, err := jwt.Signed(signer.Jose()).
		Claims(jwt.Claims{Subject: "alice"}).
		Claims(map[string]any{"admin": true}).
		Serialize()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(token)
	// Output: eyJhbGciOiJFZERTQSIsImtpZCI6IjIwMjYtMSJ9.eyJhZG1pbiI6dHJ1ZSwic3ViIjoiYWxpY2UifQ.5LHp6tzEHVdGQEI9eZr6kWEMV0lMH5hK9CAWuCUQWQtNiPLcKBIRuWye0xxLMf0bjGSM9w_SHTB3cKdjyRPtCg
}

func ExampleMarshalClaims() {
	payload, err := jws.MarshalClaims(map[string]any{"sub": "alice", "admin": false})
	fmt.Println(string(payload), err)

	_, err = jws.MarshalClaims(json.RawMessage(`["alice"]`))
	fmt.Println(errors.Is(err, jws.ErrClaims), err)

	_, err = jws.MarshalClaims(json.RawMessage(`{"sub":"alice","sub":"admin"}`))
	fmt.Println(errors.Is(err, jws.ErrClaims), err)
	// Output:
	// {"admin":false,"sub":"alice"} <nil>
	// true invalid claims: a JSON object is needed, this is a JSON array
	// true invalid claims: the claim "sub" is there twice
}

// A token is refused, whoever signed it, if its algorithm is not on the list.
func ExampleVerifier_Verify() {
	key := rfc8037()
	verifier, err := jws.NewKeyVerifier(key.Public(), jws.VerifierOptions{Algorithms: []hsmkey.Algorithm{hsmkey.EdDSA}})
	if err != nil {
		log.Fatal(err)
	}
	verified, err := verifier.Verify(context.Background(), "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc.hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s %s\n", verified.Header.Raw, verified.Payload)

	_, err = verifier.Verify(context.Background(), "eyJhbGciOiJub25lIn0.e30.")
	fmt.Println(errors.Is(err, jws.ErrVerify), err)
	// Output:
	// {"alg":"EdDSA"} Example of Ed25519 signing
	// true the token does not verify: it is signed with "none", only EdDSA is allowed
}
