package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/hsmkey/hsmkey"
)

const importable = "RSA keys of 2048 bits or more, EC keys on P-256, P-384 or P-521, and Ed25519 keys can be imported, in PKCS#8"

func (a *app) keyImportCommand() *cobra.Command {
	var in, idText string
	cmd := &cobra.Command{
		Use:   "import LABEL --in FILE",
		Short: "Put a private key onto the HSM and print its public JWK",
		Long: `Puts a private key from a PEM file in PKCS#8 (as openssl genpkey writes it) onto
the HSM, where it cannot be read any more, and prints the public JWK. The file
stays: once the key is on the HSM, destroy it. A label that is taken is refused.

With a balance list the key goes to every endpoint. One that has this very key
already is left as it is: after a failure on some endpoints, run it again.`,
		Example: `  openssl genpkey -algorithm ED25519 -out imported.pem
  hsmkey key import my-import --in imported.pem
  openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 | hsmkey key import my-import-2 --in -`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if in == "" {
				return withHint(usagef("--in is missing"), "it names a PEM file with a PKCS#8 private key, or - for standard input")
			}
			id, err := parseID(idText)
			if err != nil {
				return err
			}
			file, err := a.readInput("--in", in)
			if err != nil {
				return err
			}
			private, err := hsmkey.ParsePrivateKey(file)
			if err != nil {
				return withHint(fmt.Errorf("--in: %w", err), importable)
			}
			var made any
			err = a.changeHSM(cmd.Context(), func(h *hsmkey.HSM) error {
				key, results, err := h.ImportEach(cmd.Context(), args[0], private, id)
				if err := a.tellOutcomes(results, err); err != nil {
					return err
				}
				made, err = describeKey(key)
				return err
			})
			if errors.Is(err, hsmkey.ErrUnsupported) {
				return withHint(err, importable)
			}
			if err != nil {
				return err
			}
			return a.printMade(args[0], made)
		},
	}
	cmd.Flags().StringVar(&in, "in", "", "PEM file with the private key, - for standard input")
	cmd.Flags().StringVar(&idText, "id", "", "id of the key, in hexadecimal digits (default: random)")
	return cmd
}
