package main

import (
	"encoding/hex"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/hsmkey/hsmkey"
)

// keyFlags name a key on the HSM.
type keyFlags struct{ label, id string }

func (k *keyFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&k.label, "key", "", "label of the key")
	k.registerID(cmd, "id of the key, in hexadecimal digits; with or without its label")
}

func (k *keyFlags) registerID(cmd *cobra.Command, usage string) {
	cmd.Flags().StringVar(&k.id, "id", "", usage)
}

func (k *keyFlags) given() bool { return k.label != "" || k.id != "" }

func (k *keyFlags) query() (hsmkey.Query, error) {
	id, err := parseID(k.id)
	if err != nil {
		return hsmkey.Query{}, err
	}
	if !k.given() {
		return hsmkey.Query{}, withHint(usagef("which key? --key is missing"), "`hsmkey key list` shows the keys of the token")
	}
	return hsmkey.Query{Label: k.label, ID: id}, nil
}

// parseID reads --id; nothing is nil.
func parseID(text string) ([]byte, error) {
	if text == "" {
		return nil, nil
	}
	id, err := hex.DecodeString(text)
	if err != nil {
		return nil, withHint(usagef("--id %q is not an even number of hexadecimal digits", text), "an id looks like 0a1b2c; `hsmkey key list` shows those of the token")
	}
	return id, nil
}

// algorithms are those that a token may be signed with.
var algorithms = []string{
	string(hsmkey.RS256), string(hsmkey.RS384), string(hsmkey.RS512),
	string(hsmkey.PS256), string(hsmkey.PS384), string(hsmkey.PS512),
	string(hsmkey.ES256), string(hsmkey.ES384), string(hsmkey.ES512),
	string(hsmkey.EdDSA),
	string(hsmkey.HS256), string(hsmkey.HS384), string(hsmkey.HS512),
}

// parseAlgorithms reads the values of --alg.
func parseAlgorithms(names []string) ([]hsmkey.Algorithm, error) {
	var list []hsmkey.Algorithm
	for _, name := range names {
		if !slices.Contains(algorithms, name) {
			return nil, withHint(usagef("--alg %q is no algorithm for signatures", name), "there are %s", strings.Join(algorithms, ", "))
		}
		list = append(list, hsmkey.Algorithm(name))
	}
	return list, nil
}

// fixedCompletions completes a flag with one of a few values.
func fixedCompletions(cmd *cobra.Command, flag string, values []string) {
	err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	if err != nil {
		panic(err) // a flag that the command does not have: a mistake of ours
	}
}
