package main

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jws"
)

func (a *app) signCommand() *cobra.Command {
	var key keyFlags
	var source payloadFlags
	var algorithm, keyID, typ, formatName string
	cmd := &cobra.Command{
		Use:   "sign --key LABEL",
		Short: "Sign claims or any payload, print the token",
		Long: `Signs claims, which makes a JSON Web Token, or any payload, with a key on the HSM.
Without --claims and --payload the claims are read from standard input.

The algorithm follows the key: RS256, ES256, ES384, ES512, EdDSA, HS256, HS384 or
HS512; RSA keys also sign by RS384, RS512, PS256, PS384 and PS512. The kid is the
thumbprint of the public key (RFC 7638), as in jwk and jwks.`,
		Example: `  hsmkey key generate my-signer --type ec:P-256
  hsmkey sign --key my-signer --claims '{"sub":"alice"}' --expires-in 1h
  echo '{"sub":"bob"}' | hsmkey sign --key my-signer
  echo 'any text' | hsmkey sign --key my-signer --payload - --format json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			query, err := key.query()
			if err != nil {
				return err
			}
			options := jws.Options{KeyID: keyID, Type: typ}
			options.NoKeyID = cmd.Flags().Changed("kid") && keyID == ""
			if algorithm != "" {
				list, err := parseAlgorithms([]string{algorithm})
				if err != nil {
					return err
				}
				options.Algorithm = list[0]
			}
			format, err := jws.ParseFormat(formatName)
			if err != nil {
				return withHint(usagef("--format: %w", err), "a JWT is always compact")
			}
			source.expiresGiven = cmd.Flags().Changed("expires-in")
			payload, err := a.readPayload(&source)
			if err != nil {
				return err
			}
			if source.payload == "" && !cmd.Flags().Changed("typ") && format == jws.Compact {
				options.Type = "JWT"
			}
			var token string
			err = a.withHSM(cmd.Context(), func(h *hsmkey.HSM) error {
				found, err := h.Key(cmd.Context(), query)
				if err != nil {
					return err
				}
				signer, err := jws.NewSigner(found, options)
				if errors.Is(err, hsmkey.ErrConfig) {
					return withHint(err, "--kid and --typ are text, in UTF-8")
				}
				if err != nil {
					return err
				}
				token, err = signer.SignFormat(cmd.Context(), payload, format)
				return err
			})
			if err != nil {
				return err
			}
			return a.printLine(token)
		},
	}
	key.register(cmd)
	flags := cmd.Flags()
	flags.StringVar(&algorithm, "alg", "", "algorithm (default: the key's)")
	flags.StringVar(&source.claims, "claims", "", "claims: a JSON object, @FILE, or - for standard input")
	flags.StringVar(&source.payload, "payload", "", "any payload: FILE, or - for standard input")
	flags.StringVar(&typ, "typ", "", `typ of the header (default: "JWT" for claims in compact form)`)
	flags.StringVar(&keyID, "kid", "", `kid of the header (default: the key's thumbprint; "": none)`)
	flags.DurationVar(&source.expiresIn, "expires-in", 0, "add the claims iat, now, and exp, this much later, such as 1h")
	flags.StringVar(&formatName, "format", jws.Compact.String(), "compact, json (general JSON) or flattened")
	mayBeEmpty(flags, "typ", "kid")
	fixedCompletions(cmd, "alg", algorithms)
	fixedCompletions(cmd, "format", []string{jws.Compact.String(), jws.General.String(), jws.Flattened.String()})
	return cmd
}
