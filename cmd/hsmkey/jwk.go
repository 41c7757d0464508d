package main

import (
	"github.com/spf13/cobra"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jwk"
)

func (a *app) jwkCommand() *cobra.Command {
	var named keyFlags
	cmd := &cobra.Command{
		Use:   "jwk LABEL",
		Short: "Print the public JWK of a key",
		Long: `Prints the public half of a key as a JSON Web Key (RFC 7517). HMAC keys have no
public half.`,
		Example: `  hsmkey key generate my-public --type ec:P-256
  hsmkey jwk my-public`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				named.label = args[0]
			}
			if !named.given() {
				return withHint(usagef("which key? a label or --id is missing"), "`hsmkey key list` shows the keys of the token")
			}
			query, err := named.query()
			if err != nil {
				return err
			}
			var public jwk.Key
			err = a.withHSM(cmd.Context(), func(h *hsmkey.HSM) error {
				key, err := h.Key(cmd.Context(), query)
				if err != nil {
					return err
				}
				public, err = jwk.Public(key)
				return err
			})
			if err != nil {
				return err
			}
			return a.printJSON(public)
		},
	}
	named.registerID(cmd, "id of the key, in hexadecimal digits; with or without its label")
	return cmd
}
