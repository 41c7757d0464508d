package hsmkey_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/ThalesGroup/crypto11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/testhsm"
)

// peer opens a test HSM through crypto11, the library that our users come from,
// for as long as fn runs.
func peer(tb testing.TB, test *testhsm.HSM, fn func(*crypto11.Context)) {
	tb.Helper()
	c, err := crypto11.Configure(&crypto11.Config{Path: test.Module, TokenLabel: test.Labels[0], Pin: testhsm.PIN})
	if err != nil {
		tb.Fatal(err)
	}
	defer func() {
		if err := c.Close(); err != nil {
			tb.Error(err)
		}
	}()
	fn(c)
}

// session opens a test HSM through this package, for as long as fn runs.
func session(tb testing.TB, test *testhsm.HSM, fn func(*hsmkey.HSM)) {
	tb.Helper()
	h, err := hsmkey.Open(context.Background(), config(test))
	if err != nil {
		tb.Fatal(err)
	}
	defer func() {
		if err := h.Close(context.Background()); err != nil {
			tb.Error(err)
		}
	}()
	fn(h)
}

func TestCrypto11FindsOurKeysAndSignsWithThem(t *testing.T) {
	test := testhsm.New(t)
	keys := map[string]crypto.PublicKey{}
	session(t, test, func(h *hsmkey.HSM) {
		for _, typ := range []hsmkey.KeyType{hsmkey.RSA2048, hsmkey.P256, hsmkey.P384, hsmkey.P521} {
			keys["generated "+string(typ)] = generate(t, h, "generated "+string(typ), typ).Public()
		}
		for typ, private := range newKeys(t) {
			if typ == hsmkey.Ed25519 {
				continue // crypto11 does not know it
			}
			imported, err := h.Import(context.Background(), "imported "+string(typ), private, nil)
			if err != nil {
				t.Fatal(err)
			}
			keys["imported "+string(typ)] = imported.Public()
		}
	})
	peer(t, test, func(c *crypto11.Context) {
		digest := make([]byte, 32)
		for label, public := range keys {
			key, err := c.FindKeyPair(nil, []byte(label))
			if err != nil || key == nil {
				t.Errorf("%s: %v, %v", label, key, err)
				continue
			}
			if !samePublic(key.Public(), public) {
				t.Errorf("%s: another public key", label)
			}
			signature, err := key.Sign(rand.Reader, digest, crypto.SHA256)
			if err != nil {
				t.Errorf("%s: %v", label, err)
			} else if err := verifyDigest(public, digest, signature); err != nil {
				t.Errorf("%s: %v", label, err)
			}
		}
	})
}

func TestWeFindTheKeysOfCrypto11(t *testing.T) {
	test := testhsm.New(t)
	keys := map[string]crypto.PublicKey{}
	peer(t, test, func(c *crypto11.Context) {
		key, err := c.GenerateRSAKeyPairWithLabel([]byte("1"), []byte("rsa"), 2048)
		if err != nil {
			t.Fatal(err)
		}
		keys["rsa"] = key.Public()
	})
	session(t, test, func(h *hsmkey.HSM) {
		for label, public := range keys {
			if found := mustFind(t, h, hsmkey.Query{Label: label}); !samePublic(found.Public(), public) {
				t.Errorf("%s: another public key", label)
			}
		}
	})
}

func TestCrypto11AndWeUseOneModuleAtOnce(t *testing.T) {
	test := testhsm.New(t)
	peer(t, test, func(c *crypto11.Context) { // it must come first: it insists on initialising the module
		for range 2 {
			session(t, test, func(h *hsmkey.HSM) {
				key, err := h.Key(context.Background(), hsmkey.Query{Label: "key"})
				if err != nil {
					key = generate(t, h, "key", hsmkey.P256)
				}
				signOnce(t, key)
			})
			// We are closed, and it goes on.
			theirs, err := c.FindKeyPair(nil, []byte("key"))
			if err != nil || theirs == nil {
				t.Fatalf("%v, %v", theirs, err)
			}
			if _, err := theirs.Sign(rand.Reader, make([]byte, 32), crypto.SHA256); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestPKCS11ToolReadsOurPublicKeys(t *testing.T) {
	test := testhsm.New(t)
	keys := map[string]crypto.PublicKey{}
	session(t, test, func(h *hsmkey.HSM) {
		// OpenSC 0.23 does not read P-384.
		for _, typ := range []hsmkey.KeyType{hsmkey.RSA2048, hsmkey.P256, hsmkey.P521} {
			keys[string(typ)] = generate(t, h, string(typ), typ).Public()
		}
	})
	for label, public := range keys {
		file := filepath.Join(t.TempDir(), "public")
		testhsm.PKCS11Tool(t, test, "--read-object", "--type", "pubkey", "--label", label, "--output-file", file)
		der, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		theirs, err := x509.ParsePKIXPublicKey(der)
		if err != nil || !samePublic(theirs, public) {
			t.Errorf("%s: it reads another public key, %v", label, err)
		}
	}
}

func TestOpenSSLVerifiesOurSignatures(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	message := []byte("header.payload")
	session(t, testhsm.New(t), func(h *hsmkey.HSM) {
		for _, typ := range []hsmkey.KeyType{hsmkey.RSA2048, hsmkey.RSA3072, hsmkey.P256, hsmkey.P384, hsmkey.P521, hsmkey.Ed25519} {
			key := generate(t, h, string(typ), typ)
			der, err := x509.MarshalPKIXPublicKey(key.Public())
			if err != nil {
				t.Fatal(err)
			}
			public := file("public.pem", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
			for _, algorithm := range key.Algorithms() {
				signature, err := key.SignJWS(context.Background(), algorithm, message)
				if err != nil {
					t.Fatal(err)
				}
				bits := string(algorithm[2:])
				args := []string{"dgst", "-sha" + bits, "-verify", public, "-signature"}
				switch algorithm[:2] {
				case "ES": // as OpenSSL has it, of the same call underneath
					if signature, err = key.SignMessage(nil, message, hashes[bits]); err != nil {
						t.Fatal(err)
					}
				case "PS":
					args = append([]string{"dgst", "-sha" + bits, "-sigopt", "rsa_padding_mode:pss",
						"-sigopt", fmt.Sprintf("rsa_pss_saltlen:%d", hashes[bits].Size())}, args[2:]...)
				case "Ed":
					args = []string{"pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", file("message", message), "-sigfile"}
				}
				args = append(args, file("signature", signature))
				cmd := exec.Command("openssl", args...)
				if algorithm[:2] != "Ed" {
					cmd.Args = append(cmd.Args, file("message", message))
				}
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Errorf("%s with %s: %v: %s", algorithm, typ, err, out)
				}
			}
		}
	})
}
