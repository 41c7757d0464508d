package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/softhsm"
)

func (a *app) initCommand() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make a private SoftHSM2 token for development",
		Long: `Makes a software token for development in a directory of its own, with random
PINs, and prints the lines that point a shell to it. Where that directory is
.hsm, hsmkey finds the token without them.

Run again, it changes nothing and prints the same lines. The token is as safe as
the files in its directory: it is not for production.`,
		Example: `  hsmkey init
  eval "$(hsmkey init)"
  hsmkey init --dir .hsm-second --token second`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// The label is the flag's, never HSM_TOKEN: that is another token's.
			label := a.global.token
			if label != "" {
				if err := softhsm.CheckLabel(label); err != nil {
					return &usageError{err}
				}
			}
			module, err := a.softHSMModule()
			if err != nil {
				return err
			}
			a.catchSignals()
			token, made, err := softhsm.Make(cmd.Context(), dir, module, label)
			if errors.Is(err, hsmkey.ErrConfig) {
				return initHint(err, dir)
			}
			if err != nil {
				return err
			}
			if made {
				a.note("Made the token %q for development in %s.", token.Label, dir)
			}
			if _, set := os.LookupEnv(envPIN); set {
				a.note("warning: HSM_PIN is set; unset it, the PIN of this token is in HSM_PIN_FILE")
			}
			return withHint(a.print(exports(token, module)), "the token is there; run it again to print the lines")
		},
	}
	cmd.Flags().StringVar(&dir, "dir", developmentDir, "directory of the token; made if it is not there")
	return cmd
}

// initHint says what to do about a token that cannot be made, or is another one.
func initHint(err error, dir string) error {
	parent := filepath.Dir(dir)
	if _, missing := os.Stat(parent); missing != nil {
		return withHint(err, "make the directory above it first: mkdir -p %s", shellQuote(parent))
	}
	return withHint(err, "choose another --dir, --token or --module; a token that is incomplete can be made anew when its directory, with all keys in it, is removed")
}

// softHSMModule returns the absolute path of the library that makes the token.
func (a *app) softHSMModule() (string, error) {
	if a.global.module != "" {
		if err := setEnvironment(map[string]string{envModule: a.global.module}); err != nil {
			return "", err
		}
	}
	config, err := hsmkey.FromEnv()
	if err != nil {
		return "", err
	}
	module := config.Pool.Module
	if module == "" {
		return "", withHint(fmt.Errorf("%w: SoftHSM2 is not installed in any of the usual places", hsmkey.ErrConfig),
			"install it (Debian: apt-get install softhsm2), or name its library with --module")
	}
	if _, err := os.Stat(module); err != nil {
		return "", withHint(fmt.Errorf("%w: cannot read the PKCS#11 library: %w", hsmkey.ErrConfig, err),
			"name SoftHSM2's library with --module, or unset HSM_MODULE")
	}
	return filepath.Abs(module)
}

// exports are the lines that point a shell to a token.
func exports(token softhsm.Token, module string) []byte {
	var lines bytes.Buffer
	for _, variable := range [][2]string{
		{envSoftHSM, token.Conf()},
		{envModule, module},
		{envToken, token.Label},
		{envPINFile, token.PINFile()},
	} {
		fmt.Fprintf(&lines, "export %s=%s\n", variable[0], shellQuote(variable[1]))
	}
	return lines.Bytes()
}

// shellQuote makes a word of any text, for every shell that knows POSIX quotes.
func shellQuote(text string) string {
	special := func(r rune) bool {
		return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+:@%,", r)
	}
	if text != "" && !strings.ContainsFunc(text, special) {
		return text
	}
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}
