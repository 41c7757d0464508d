package main

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jwk"
)

func (a *app) keyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "key",
		Short: "Generate, import, list and delete keys on the HSM",
		Example: `  hsmkey key generate demo-key --type ec:P-256
  hsmkey key list`,
	}
	asGroup(cmd)
	cmd.AddCommand(
		a.keyGenerateCommand(),
		a.keyImportCommand(),
		a.keyListCommand(),
		a.keyDeleteCommand(),
	)
	return cmd
}

// tellOutcomes tells what was done on which endpoint of the balance lists. What
// failed there, err says.
func (a *app) tellOutcomes(results []hsmkey.EndpointResult, err error) error {
	for _, r := range results {
		if r.Err == nil {
			a.note("%s: %s", r.Endpoint, r.Outcome)
		}
	}
	switch {
	case len(results) == 0 || errors.Is(err, hsmkey.ErrPIN):
	case errors.Is(err, hsmkey.ErrSession), errors.Is(err, hsmkey.ErrTimeout):
		return withHint(err, "run it again when every endpoint is up: what is done stays done. `hsmkey doctor` shows which are")
	case errors.Is(err, hsmkey.ErrExists), errors.Is(err, hsmkey.ErrAmbiguous):
		return withHint(err, "a balance list of one endpoint alone reaches the key there, such as to delete it; `hsmkey doctor` shows which have which")
	}
	return err
}

// describeKey is what is said of a new key: its public JWK, or for an HMAC key,
// which has no public half, a JWK without the secret.
func describeKey(key *hsmkey.HSMJWK) (any, error) {
	if key.Public() != nil {
		return jwk.Public(key)
	}
	kid, err := jwk.KeyID(key)
	if err != nil {
		return nil, err
	}
	return struct {
		Type       string           `json:"kty"`
		KeyID      string           `json:"kid"`
		Algorithm  hsmkey.Algorithm `json:"alg"`
		Use        string           `json:"use"`
		Operations []string         `json:"key_ops"`
	}{"oct", kid, key.Algorithms()[0], "sig", []string{"sign", "verify"}}, nil
}

// printMade prints what is said of a new key. Where that fails the key is there all
// the same.
func (a *app) printMade(label string, made any) error {
	again := "`hsmkey key list` shows it"
	if _, public := made.(jwk.Key); public {
		again = "`hsmkey jwk " + shellQuote(label) + "` prints it"
	}
	return withHint(a.printJSON(made), "the key was made; %s", again)
}
