package testhsm_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/internal/testhsm"
)

// keyType returns the CKA_KEY_TYPE of the only private key with that label.
func keyType(t *testing.T, p *pkcs11.Ctx, session pkcs11.SessionHandle, label string) uint {
	t.Helper()
	err := p.FindObjectsInit(session, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
	})
	if err != nil {
		t.Fatal(err)
	}
	keys, _, err := p.FindObjects(session, 2)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.FindObjectsFinal(session); err != nil {
		t.Fatal(err)
	}
	if len(keys) != 1 {
		t.Fatalf("%d private keys with label %q, want 1", len(keys), label)
	}
	attributes, err := p.GetAttributeValue(session, keys[0], []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, nil),
	})
	if err != nil {
		t.Fatal(err)
	}
	return uint(attributes[0].Value[0]) | uint(attributes[0].Value[1])<<8
}

func TestGeneratedKeysHaveTheirTypes(t *testing.T) {
	h := testhsm.New(t)
	testhsm.GenerateEC(t, h, "an ec key", "01")
	testhsm.GenerateRSA(t, h, "an rsa key", "02")
	testhsm.GenerateEd25519(t, h, "an ed25519 key", "03")

	p := load(t, h.Module)
	session := login(t, p)
	const ckkECEdwards = 0x40
	for label, want := range map[string]uint{
		"an ec key":      pkcs11.CKK_EC,
		"an rsa key":     pkcs11.CKK_RSA,
		"an ed25519 key": ckkECEdwards,
	} {
		if got := keyType(t, p, session, label); got != want {
			t.Errorf("%s: key type %#x, want %#x", label, got, want)
		}
	}
}

func TestAnImportedKeyIsTheSameOnTwoHSMs(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	var points []string
	for range 2 {
		h := testhsm.NewDetached(t)
		testhsm.Import(t, h, key, "shared", "0a")
		for line := range strings.Lines(testhsm.PKCS11Tool(t, h, "--list-objects", "--type", "pubkey", "--id", "0a")) {
			if strings.Contains(line, "EC_POINT:") {
				points = append(points, line)
			}
		}
	}
	if len(points) != 2 || points[0] != points[1] {
		t.Errorf("public points = %q, want two equal ones", points)
	}
}

func TestPKCS11ToolTakesAnotherToken(t *testing.T) {
	h := testhsm.NewDetached(t, "first", "second")
	testhsm.PKCS11Tool(t, h, "--token-label", "second", "--keypairgen", "--key-type", "EC:prime256v1", "--label", "there")
	if out := testhsm.PKCS11Tool(t, h, "--list-objects"); strings.Contains(out, "there") {
		t.Errorf("the key is on the first token:\n%s", out)
	}
	if out := testhsm.PKCS11Tool(t, h, "--token-label", "second", "--list-objects"); !strings.Contains(out, "there") {
		t.Errorf("the key is not on the second token:\n%s", out)
	}
}
