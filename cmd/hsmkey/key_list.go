package main

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jwk"
)

// listedKey is a key in `key list`.
type listedKey struct {
	Label      string             `json:"label"`
	ID         string             `json:"id"`
	Type       string             `json:"type,omitempty"`
	Algorithms []hsmkey.Algorithm `json:"algorithms"`
	KeyID      string             `json:"kid,omitempty"`
	Error      string             `json:"error,omitempty"` // why it signs no tokens
}

func (a *app) keyListCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the private and secret keys of the token",
		Long: `Lists every private and secret key of the token: label, id, type, the algorithms
that it signs with, the default first, and the kid of its tokens. With --json
each is a JSON object on a line of its own. A key that signs no tokens is listed
with the reason.`,
		Example: `  hsmkey key generate my-first --type ec:P-256
  hsmkey key list
  hsmkey key list --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var keys []hsmkey.KeyInfo
			err := a.withHSM(cmd.Context(), func(h *hsmkey.HSM) (err error) {
				keys, err = h.Keys(cmd.Context())
				return err
			})
			if err != nil {
				return err
			}
			list := make([]listedKey, len(keys))
			for i, info := range keys {
				list[i] = newListedKey(info)
			}
			if asJSON {
				for _, key := range list {
					if err := a.printJSON(key); err != nil {
						return err
					}
				}
				return nil
			}
			if len(list) == 0 {
				a.note("The token has no keys; `hsmkey key generate` makes one.")
				return nil
			}
			return a.printTable(list)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "one JSON object a line")
	return cmd
}

func newListedKey(info hsmkey.KeyInfo) listedKey {
	key := listedKey{Label: info.Label, ID: hex.EncodeToString(info.ID), Algorithms: []hsmkey.Algorithm{}}
	if info.Err != nil {
		key.Error = info.Err.Error()
		return key
	}
	key.Type = info.Key.Type().String()
	if algorithms := info.Key.Algorithms(); len(algorithms) > 0 {
		key.Algorithms = algorithms
	}
	var err error
	if key.KeyID, err = jwk.KeyID(info.Key); err != nil {
		key.Error = err.Error()
	}
	return key
}

func (a *app) printTable(list []listedKey) error {
	var table bytes.Buffer
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "LABEL\tID\tTYPE\tALGORITHMS\tKID")
	for _, key := range list {
		names := make([]string, len(key.Algorithms))
		for i, algorithm := range key.Algorithms {
			names[i] = string(algorithm)
		}
		row := []string{key.Label, key.ID, key.Type, strings.Join(names, ","), key.KeyID}
		for i, cell := range row {
			if row[i] = plain(cell); row[i] == "" {
				row[i] = "-"
			}
		}
		fmt.Fprintln(w, strings.Join(row, "\t"))
		if key.Error != "" {
			a.note("warning: %s", key.Error)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return a.print(table.Bytes())
}
