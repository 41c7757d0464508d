package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/hsmkey/hsmkey"
)

func (a *app) keyDeleteCommand() *cobra.Command {
	var named keyFlags
	var yes bool
	cmd := &cobra.Command{
		Use:   "delete LABEL",
		Short: "Delete a key from the HSM for ever",
		Long: `Deletes a key and its public key from the HSM. There is no way back. It asks
before that on a terminal; elsewhere it wants --yes.

With a balance list the key is deleted on every endpoint. One that lacks it is
fine, if another had it: after a failure on some endpoints, run it again. Where
endpoints have different keys of this name, nothing is deleted.`,
		Example: `  hsmkey key generate my-old-key --type ec:P-256
  hsmkey key delete my-old-key --yes`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				named.label = args[0]
			}
			if !named.given() {
				return usagef("which key? a label or --id is missing")
			}
			query, err := named.query()
			if err != nil {
				return err
			}
			if !yes && !a.stdinIsTerminal() {
				return withHint(usagef("deleting a key needs --yes where there is nobody to ask"), "add --yes to delete the key with %s for ever", query)
			}
			err = a.changeHSM(cmd.Context(), func(h *hsmkey.HSM) error {
				if !yes {
					if err := a.confirmDeletion(cmd.Context(), h, query); err != nil {
						return err
					}
				}
				results, err := h.DeleteEach(cmd.Context(), query)
				return a.tellOutcomes(results, err)
			})
			if err != nil {
				return err
			}
			a.note("Deleted the key with %s.", query)
			return nil
		},
	}
	named.registerID(cmd, "id of the key, in hexadecimal digits; with or without its label")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

// confirmDeletion asks whether to delete the key, if there is exactly one. A key
// that signs no tokens can be deleted, too.
func (a *app) confirmDeletion(ctx context.Context, h *hsmkey.HSM, query hsmkey.Query) error {
	what := query.String()
	key, err := h.Key(ctx, query)
	switch {
	case err == nil:
		what = fmt.Sprintf("%s (%s)", hsmkey.Query{Label: key.Label(), ID: key.ID()}, key.Type())
	case errors.Is(err, hsmkey.ErrUnsupported):
	case (errors.Is(err, hsmkey.ErrKeyNotFound) || errors.Is(err, hsmkey.ErrAmbiguous)) && lacksPublic(ctx, h, query):
	default:
		return err
	}
	where := ""
	if h.Balancer() != nil {
		where = " on every HSM of the balance lists"
	}
	fmt.Fprintf(a.stderr, "Delete the key with %s%s for ever? [y/N] ", plain(what), where)
	answered := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(a.stdin).ReadString('\n') // no answer is no
		answered <- strings.ToLower(strings.TrimSpace(line))
	}()
	select {
	case answer := <-answered:
		if answer == "y" || answer == "yes" {
			return nil
		}
		return withHint(errors.New("not deleted"), "")
	case <-ctx.Done():
		fmt.Fprintln(a.stderr)
		return context.Cause(ctx)
	}
}

// lacksPublic reports whether there is one such key, and it is only its public half
// that is not found, or ambiguous.
func lacksPublic(ctx context.Context, h *hsmkey.HSM, query hsmkey.Query) bool {
	keys, err := h.Keys(ctx)
	keys = slices.DeleteFunc(keys, func(k hsmkey.KeyInfo) bool {
		return query.Label != "" && k.Label != query.Label || len(query.ID) > 0 && !bytes.Equal(k.ID, query.ID)
	})
	return err == nil && len(keys) == 1 && keys[0].Err != nil
}
