package hsmkey_test

import (
	"context"
	"slices"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/sessionpool"
)

func TestATokenTellsByWhichAlgorithmsItSigns(t *testing.T) {
	all := []hsmkey.Algorithm{
		hsmkey.RS256, hsmkey.RS384, hsmkey.RS512, hsmkey.PS256, hsmkey.PS384, hsmkey.PS512,
		hsmkey.ES256, hsmkey.ES384, hsmkey.ES512, hsmkey.EdDSA, hsmkey.HS256, hsmkey.HS384, hsmkey.HS512,
	}
	for _, test := range []struct {
		lacks   []uint
		without []hsmkey.Algorithm
	}{
		{},
		{lacks: []uint{0x1057}, without: []hsmkey.Algorithm{hsmkey.EdDSA}},
		{lacks: []uint{pkcs11.CKM_RSA_PKCS}}, // there are mechanisms that hash, too
		{lacks: []uint{pkcs11.CKM_RSA_PKCS, pkcs11.CKM_SHA384_RSA_PKCS}, without: []hsmkey.Algorithm{hsmkey.RS384}},
		{lacks: []uint{pkcs11.CKM_SHA256_HMAC, pkcs11.CKM_SHA512_HMAC}, without: []hsmkey.Algorithm{hsmkey.HS256, hsmkey.HS512}},
	} {
		h := wrapped(t, func(m sessionpool.Module) sessionpool.Module {
			return lacks{odd: odd{m}, mechanisms: test.lacks}
		})
		s, err := h.Source().Acquire(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		want := slices.DeleteFunc(slices.Clone(all), func(a hsmkey.Algorithm) bool { return slices.Contains(test.without, a) })
		if got := hsmkey.TokenAlgorithms(s.Token()); !slices.Equal(got, want) {
			t.Errorf("without mechanisms %x: %v, want %v", test.lacks, got, want)
		}
		s.Release()
		if err := h.Close(context.Background()); err != nil {
			t.Error(err)
		}
	}
}
