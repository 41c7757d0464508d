package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"slices"
	"strings"

	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spf13/cobra"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jws"
)

func (a *app) verifyCommand() *cobra.Command {
	var key keyFlags
	var keySet string
	var algorithmNames []string
	cmd := &cobra.Command{
		Use:   "verify (--key LABEL | --jwks FILE|URL) [TOKEN|-]",
		Short: "Verify a token, print its header and claims",
		Long: `Verifies a token, given as an argument or on standard input, and prints its header
and claims as JSON. A payload that is no JSON object is printed as "payload", in
base64url. A token that does not verify, is expired ("exp") or not valid yet
("nbf", "iat"; a minute's difference of clocks is allowed) ends with status 6.

The keys are those of a JWK Set in a file or at an HTTPS URL, for which no HSM is
needed, or a key on the HSM. HMAC is computed on the HSM, the rest here.`,
		Example: `  hsmkey key generate my-issuer --type ec:P-256
  hsmkey jwks my-issuer > jwks.json
  hsmkey sign --key my-issuer --claims '{"sub":"alice"}' > token.jwt
  hsmkey verify --jwks jwks.json < token.jwt
  hsmkey verify --key my-issuer --alg ES256 "$(cat token.jwt)"`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case key.given() && keySet != "":
				return usagef("--key and --jwks both say whose tokens to accept")
			case !key.given() && keySet == "":
				return withHint(usagef("whose tokens? --key or --jwks is missing"), "--jwks takes a file or URL and needs no HSM; --key names a key on the HSM")
			}
			allowed, err := parseAlgorithms(algorithmNames)
			if err != nil {
				return err
			}
			token, err := a.readToken(args)
			if err != nil {
				return err
			}
			var verified *jws.Token
			if keySet != "" {
				verified, err = verifyBySet(cmd.Context(), keySet, allowed, token)
			} else {
				verified, err = a.verifyByKey(cmd.Context(), &key, allowed, token)
			}
			if err != nil {
				return verifyHint(err)
			}
			return a.printJSON(describeToken(verified))
		},
	}
	key.register(cmd)
	cmd.Flags().StringVar(&keySet, "jwks", "", "JWK Set, or a single JWK: FILE or https URL")
	cmd.Flags().StringSliceVar(&algorithmNames, "alg", nil, "algorithms to accept, with commas (default: those of the keys)")
	fixedCompletions(cmd, "alg", algorithms)
	return cmd
}

// readToken takes the token from the arguments or standard input, without the
// line's end that a file or a pipe adds.
func (a *app) readToken(args []string) (string, error) {
	if len(args) == 1 && args[0] != "-" {
		return strings.TrimSpace(args[0]), nil
	}
	if len(args) == 0 && a.stdinIsTerminal() {
		return "", withHint(usagef("the token is missing"), "give it as the last argument or on standard input")
	}
	data, err := a.readStdin(maxToken)
	return string(bytes.TrimSpace(data)), err
}

// verifyBySet needs no HSM.
func verifyBySet(ctx context.Context, source string, allowed []hsmkey.Algorithm, token string) (*jws.Token, error) {
	set, err := readKeySet(ctx, source)
	if err != nil {
		return nil, err
	}
	if len(allowed) == 0 {
		for _, key := range set.Keys() {
			allowed = append(allowed, key.Algorithms()...)
		}
		slices.Sort(allowed)
		allowed = slices.Compact(allowed)
		if len(allowed) == 0 {
			return nil, withHint(usagef("--jwks: %s has no key that verifies signatures", source), "`hsmkey jwks` prints such a set")
		}
	}
	verifier, err := jws.NewVerifier(set, jws.VerifierOptions{Algorithms: allowed, MaxSize: maxToken})
	if err != nil {
		return nil, withHint(err, "without --alg it is those of the keys in %s", source)
	}
	return verifyWith(ctx, verifier, token)
}

func (a *app) verifyByKey(ctx context.Context, named *keyFlags, allowed []hsmkey.Algorithm, token string) (*jws.Token, error) {
	query, err := named.query()
	if err != nil {
		return nil, err
	}
	var verified *jws.Token
	err = a.withHSM(ctx, func(h *hsmkey.HSM) error {
		key, err := h.Key(ctx, query)
		if err != nil {
			return err
		}
		if len(allowed) == 0 {
			allowed = key.Algorithms()
		}
		verifier, err := jws.NewKeyVerifier(key, jws.VerifierOptions{Algorithms: allowed, MaxSize: maxToken})
		if err != nil {
			return err
		}
		verified, err = verifyWith(ctx, verifier, token)
		return err
	})
	return verified, err
}

// verifyWith verifies a token and, where its payload is a claims set, the times
// in it.
func verifyWith(ctx context.Context, verifier *jws.Verifier, token string) (*jws.Token, error) {
	verified, err := verifier.Verify(ctx, token)
	if err != nil || !isObject(verified.Payload) {
		return verified, err
	}
	return verifier.VerifyClaims(ctx, token, nil)
}

func isObject(payload []byte) bool {
	return bytes.HasPrefix(bytes.TrimLeft(payload, " \t\r\n"), []byte("{")) && json.Valid(payload)
}

// describedToken is what verify prints.
type describedToken struct {
	Header  json.RawMessage `json:"header"`
	Claims  json.RawMessage `json:"claims,omitempty"`
	Payload *string         `json:"payload,omitempty"`
}

func describeToken(token *jws.Token) describedToken {
	described := describedToken{Header: token.Header.Raw}
	if isObject(token.Payload) {
		described.Claims = token.Payload
	} else {
		payload := base64.RawURLEncoding.EncodeToString(token.Payload)
		described.Payload = &payload
	}
	return described
}

// verifyHint says what to do about a token that does not verify.
func verifyHint(err error) error {
	switch {
	case errors.Is(err, jws.ErrMalformed):
		return withHint(err, "a token is three parts with dots between them, or a JSON object; was it cut off?")
	case errors.Is(err, jwt.ErrExpired):
		return withHint(err, "its issuer has to make a new one")
	case errors.Is(err, jwt.ErrNotValidYet), errors.Is(err, jwt.ErrIssuedInTheFuture):
		return withHint(err, "is the clock of this machine right?")
	case errors.Is(err, jws.ErrVerify):
		return withHint(err, "do --key or --jwks, and --alg, belong to its issuer? If they do, do not trust it")
	}
	return err
}
