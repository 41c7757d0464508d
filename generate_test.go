package hsmkey_test

import (
	"bytes"
	"context"
	"testing"

	"github.com/hsmkey/hsmkey"
)

func TestEveryTypeOfKeyIsGeneratedAndSigns(t *testing.T) {
	h := newHSM(t)
	ctx := context.Background()
	for _, typ := range hsmkey.KeyTypes() {
		t.Run(typ.String(), func(t *testing.T) {
			made := generate(t, h, "a "+typ.String(), typ)
			if made.Type() != typ || made.Label() != "a "+typ.String() || len(made.ID()) != 16 {
				t.Errorf("made %s %q %x", made.Type(), made.Label(), made.ID())
			}
			found, err := h.Key(ctx, hsmkey.Query{Label: made.Label()})
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(found.ID(), made.ID()) {
				t.Errorf("found id %x, made %x", found.ID(), made.ID())
			}
			if len(found.Algorithms()) == 0 {
				t.Fatal("no algorithms")
			}
			for _, algorithm := range found.Algorithms() {
				signature, err := found.SignJWS(ctx, algorithm, []byte("a.b"))
				if err != nil {
					t.Errorf("%s: %v", algorithm, err)
					continue
				}
				if err := verify(found, algorithm, []byte("a.b"), signature); err != nil {
					t.Errorf("%s: %v", algorithm, err)
				}
			}
		})
	}
}
