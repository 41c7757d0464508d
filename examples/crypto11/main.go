// Crypto11 signs JWTs with a key that is held through ThalesGroup/crypto11, for
// programs that have it already. Any crypto.Signer gets a JWK and a signer the
// same way.
//
//	eval "$(hsmkey init)"
//	hsmkey key generate issuer --type rsa:2048
//	go run ./examples/crypto11
//
// The environment names the HSM: HSM_MODULE, HSM_TOKEN, and HSM_PIN or
// HSM_PIN_FILE, which crypto11 does not read; hsmkey.FromEnv does.
//
// It prints the key's JWKS, a token signed with RS256 and one with PS256, which
// go-jose's own wrapper around a crypto.Signer cannot make here: it asks for
// rsa.PSSSaltLengthAuto, and crypto11 has no such thing. We ask for a salt as long
// as the hash, which is also the only one that RFC 7518, section 3.5, allows.
package main

import (
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"

	"github.com/ThalesGroup/crypto11"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jwk"
	"github.com/hsmkey/hsmkey/jws"
)

const label = "issuer"

func main() {
	if err := run(context.Background(), os.Stdout); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, out io.Writer) error {
	env, err := hsmkey.FromEnv()
	if err != nil {
		return err
	}
	if env.Pool.PIN == nil {
		return errors.New("set HSM_PIN_FILE or HSM_PIN")
	}
	pin, err := env.Pool.PIN(ctx)
	if err != nil {
		return err
	}
	token, err := crypto11.Configure(&crypto11.Config{Path: env.Pool.Module, TokenLabel: env.Pool.TokenLabel, Pin: pin})
	if err != nil {
		return err
	}
	defer func() { _ = token.Close() }()
	key, err := token.FindKeyPair(nil, []byte(label))
	if err != nil {
		return fmt.Errorf("find the key %q: %w", label, err)
	}
	if err := publish(out, key); err != nil {
		return err
	}
	for _, alg := range []hsmkey.Algorithm{hsmkey.RS256, hsmkey.PS256} {
		if err := issue(ctx, out, key, alg); err != nil {
			return err
		}
	}
	return nil
}

// publish prints the JWKS of the key. Without an alg it is good for every
// algorithm of its type.
func publish(out io.Writer, key crypto.Signer) error {
	public, err := jwk.FromPublic(key.Public(), jwk.WithAlgorithm(""))
	if err != nil {
		return err
	}
	set, err := jwk.NewSet(public)
	if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(set)
}

// issue prints a token.
func issue(ctx context.Context, out io.Writer, key crypto.Signer, alg hsmkey.Algorithm) error {
	signer, err := jws.FromSigner(key, jws.Options{Algorithm: alg, Type: "JWT"})
	if err != nil {
		return err
	}
	token, err := signer.SignClaims(ctx, jwt.Claims{Issuer: "https://issuer.example", Subject: "alice"})
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(out, token)
	return err
}
