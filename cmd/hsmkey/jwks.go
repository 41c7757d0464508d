package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jwk"
)

func (a *app) jwksCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "jwks [LABEL...]",
		Short: "Print the public keys as a JWK Set",
		Long: `Prints the public halves of the named keys as a JWK Set (RFC 7517 section 5), for
those who verify. Without labels it has every key of the token that has a public
half.`,
		Example: `  hsmkey key generate my-current --type ec:P-256
  hsmkey key generate my-next --type ed25519
  hsmkey jwks my-current my-next
  hsmkey jwks > all-keys.json`,
		RunE: func(cmd *cobra.Command, labels []string) error {
			var keys []jwk.Key
			err := a.withHSM(cmd.Context(), func(h *hsmkey.HSM) (err error) {
				if len(labels) == 0 {
					keys, err = a.allKeys(cmd.Context(), h)
				} else {
					keys, err = namedKeys(cmd.Context(), h, labels)
				}
				return err
			})
			if err != nil {
				return err
			}
			set, err := jwk.NewSet(keys...)
			if err != nil {
				return err
			}
			return a.printJSON(set)
		},
	}
}

func namedKeys(ctx context.Context, h *hsmkey.HSM, labels []string) ([]jwk.Key, error) {
	var keys []jwk.Key
	for _, label := range labels {
		key, err := h.Key(ctx, hsmkey.Query{Label: label})
		if err != nil {
			return nil, err
		}
		public, err := jwk.Public(key)
		if err != nil {
			return nil, err
		}
		keys = append(keys, public)
	}
	return keys, nil
}

// allKeys passes over keys without a public half, and warns of those that sign
// no tokens.
func (a *app) allKeys(ctx context.Context, h *hsmkey.HSM) ([]jwk.Key, error) {
	infos, err := h.Keys(ctx)
	if err != nil {
		return nil, err
	}
	var keys []jwk.Key
	for _, info := range infos {
		if info.Err != nil {
			a.note("warning: left out: %v", info.Err)
			continue
		}
		if info.Key.Public() == nil {
			continue
		}
		public, err := jwk.Public(info.Key)
		if errors.Is(err, hsmkey.ErrUnsupported) {
			a.note("warning: left out: the key with label %q: %v", info.Label, err)
			continue
		}
		if err != nil {
			return nil, err
		}
		keys = append(keys, public)
	}
	return keys, nil
}
