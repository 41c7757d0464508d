package main

import (
	"errors"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/hsmkey/hsmkey"
)

func (a *app) keyGenerateCommand() *cobra.Command {
	var typeName, idText string
	var types []string
	for _, t := range hsmkey.KeyTypes() {
		types = append(types, t.String())
	}
	cmd := &cobra.Command{
		Use:   "generate LABEL --type TYPE",
		Short: "Generate a key on the HSM and print its public JWK",
		Long: `Generates a key on the HSM, which its private half or secret never leaves, and
prints the public JWK. A label that is taken is refused. With a balance list
nothing is generated: it would be on one HSM of many.

Types: ` + strings.Join(types, ", ") + `.`,
		Example: `  hsmkey key generate my-ec --type ec:P-256
  hsmkey key generate my-rsa --type rsa:2048 --id 0a1b
  hsmkey key generate my-hmac --type hmac:256`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if typeName == "" {
				return withHint(usagef("--type is missing"), "ec:P-256 suits most; there are %s", strings.Join(types, ", "))
			}
			typ, err := hsmkey.ParseKeyType(typeName)
			if err != nil {
				return withHint(usagef("--type: %w", err), "ec:P-256 suits most")
			}
			id, err := parseID(idText)
			if err != nil {
				return err
			}
			var made any
			err = a.changeHSM(cmd.Context(), func(h *hsmkey.HSM) error {
				key, err := h.Generate(cmd.Context(), args[0], typ, id)
				if err != nil {
					return err
				}
				made, err = describeKey(key)
				return err
			})
			if errors.Is(err, hsmkey.ErrUnsupported) && os.Getenv(envBalanceList) != "" {
				return withHint(err, "generate it elsewhere and `hsmkey key import` it, or generate it on one HSM without the list and replicate it by the vendor's backup")
			}
			if errors.Is(err, hsmkey.ErrUnsupported) {
				return withHint(err, "the token may make keys of another --type: %s", strings.Join(types, ", "))
			}
			if err != nil {
				return err
			}
			return a.printMade(args[0], made)
		},
	}
	cmd.Flags().StringVar(&typeName, "type", "", "type of the key, such as ec:P-256 or rsa:2048")
	cmd.Flags().StringVar(&idText, "id", "", "id of the key, in hexadecimal digits (default: random)")
	fixedCompletions(cmd, "type", types)
	return cmd
}
