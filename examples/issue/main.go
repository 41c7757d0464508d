// Issue signs a JWT with a key in the HSM and prints it.
//
//	eval "$(hsmkey init)"
//	hsmkey key generate issuer --type ec:P-256
//	go run ./examples/issue
//
// The environment names the HSM: HSM_MODULE, HSM_TOKEN, and HSM_PIN or
// HSM_PIN_FILE.
package main

import (
	"context"
	"fmt"
	"log"
	"time"

	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jws"
)

func main() {
	token, err := issue(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(token)
}

func issue(ctx context.Context) (string, error) {
	config, err := hsmkey.FromEnv()
	if err != nil {
		return "", err
	}
	hsm, err := hsmkey.Open(ctx, config)
	if err != nil {
		return "", err
	}
	defer func() { _ = hsm.Close(ctx) }()
	key, err := hsm.Key(ctx, hsmkey.Query{Label: "issuer"})
	if err != nil {
		return "", err
	}
	signer, err := jws.NewSigner(key, jws.Options{Type: "JWT"})
	if err != nil {
		return "", err
	}
	return signer.SignClaims(ctx, jwt.Claims{
		Issuer:  "https://issuer.example",
		Subject: "alice",
		Expiry:  jwt.NewNumericDate(time.Now().Add(time.Hour)),
	})
}
