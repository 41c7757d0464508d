package hsmkey_test

import (
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hsmkey/hsmkey"
)

// pkcs8 encodes a private key.
func pkcs8(tb testing.TB, key any) []byte {
	tb.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		tb.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func TestAPrivateKeyIsReadFromPEM(t *testing.T) {
	for typ, key := range newKeys(t) {
		text := pkcs8(t, key)
		certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("any")})
		for name, data := range map[string][]byte{
			"alone":              text,
			"with text around":   []byte("Bag Attributes\n" + string(text) + "\nthe end"),
			"with certificates":  append(append([]byte(nil), certificate...), append(text, certificate...)...),
			"with CRLF newlines": []byte(strings.ReplaceAll(string(text), "\n", "\r\n")),
		} {
			got, err := hsmkey.ParsePrivateKey(data)
			if err != nil {
				t.Errorf("%s %s: %v", typ, name, err)
				continue
			}
			if string(pkcs8(t, got)) != string(text) {
				t.Errorf("%s %s: another key came out", typ, name)
			}
		}
	}
}

func TestOpenSSLsPrivateKeyIsRead(t *testing.T) {
	for _, algorithm := range []string{"ED25519", "EC", "RSA"} {
		args := []string{"genpkey", "-algorithm", algorithm}
		if algorithm == "EC" {
			args = append(args, "-pkeyopt", "ec_paramgen_curve:P-384")
		}
		out, err := exec.Command("openssl", args...).Output()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := hsmkey.ParsePrivateKey(out); err != nil {
			t.Errorf("%s: %v", algorithm, err)
		}
	}
}

func TestAFileWithoutAUsablePrivateKeyIsRefusedWithAHint(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sec1, err := x509.MarshalECPrivateKey(ecKey)
	if err != nil {
		t.Fatal(err)
	}
	x25519, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block := func(typ string, der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}) }
	secp256k1, err := exec.Command("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:secp256k1").Output()
	if err != nil {
		t.Fatal(err)
	}
	plain := filepath.Join(t.TempDir(), "plain.pem")
	encrypt := exec.Command("openssl", "genpkey", "-algorithm", "ED25519", "-aes256", "-pass", "pass:secret", "-out", plain)
	if out, err := encrypt.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	encrypted, err := exec.Command("cat", plain).Output()
	if err != nil {
		t.Fatal(err)
	}
	good := pkcs8(t, ecKey)
	for name, test := range map[string]struct {
		data []byte
		want error
		hint string
	}{
		"empty":          {nil, hsmkey.ErrInvalid, "BEGIN PRIVATE KEY"},
		"no PEM":         {[]byte("hello"), hsmkey.ErrInvalid, "BEGIN PRIVATE KEY"},
		"a certificate":  {block("CERTIFICATE", []byte("any")), hsmkey.ErrInvalid, "BEGIN PRIVATE KEY"},
		"a public key":   {block("PUBLIC KEY", []byte("any")), hsmkey.ErrInvalid, "BEGIN PRIVATE KEY"},
		"PKCS #1":        {block("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsaKey)), hsmkey.ErrInvalid, "openssl pkcs8 -topk8 -nocrypt"},
		"SEC 1":          {block("EC PRIVATE KEY", sec1), hsmkey.ErrInvalid, "openssl pkcs8 -topk8 -nocrypt"},
		"encrypted":      {encrypted, hsmkey.ErrInvalid, "encrypted"},
		"garbage":        {block("PRIVATE KEY", []byte("any")), hsmkey.ErrInvalid, "cannot be read"},
		"cut off":        {good[:len(good)-40], hsmkey.ErrInvalid, "BEGIN PRIVATE KEY"},
		"two keys":       {append(append([]byte(nil), good...), good...), hsmkey.ErrInvalid, "more than one"},
		"an X25519 key":  {pkcs8(t, x25519), hsmkey.ErrUnsupported, "X25519"},
		"another curve":  {secp256k1, hsmkey.ErrInvalid, "curve"},
		"binary garbage": {[]byte{0x30, 0x82, 0, 1, 2}, hsmkey.ErrInvalid, "BEGIN PRIVATE KEY"},
	} {
		key, err := hsmkey.ParsePrivateKey(test.data)
		if !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.hint) || key != nil {
			t.Errorf("%s: %v, %v, want %v with %q", name, key, err, test.want, test.hint)
		}
	}
}

func FuzzParsePrivateKey(f *testing.F) {
	for _, key := range newKeys(f) {
		f.Add(pkcs8(f, key))
	}
	f.Add([]byte("-----BEGIN ENCRYPTED PRIVATE KEY-----\n-----END ENCRYPTED PRIVATE KEY-----"))
	f.Fuzz(func(t *testing.T, data []byte) {
		key, err := hsmkey.ParsePrivateKey(data)
		if (key == nil) == (err == nil) {
			t.Errorf("ParsePrivateKey = %v, %v", key, err)
		}
		if err != nil && !errors.Is(err, hsmkey.ErrInvalid) && !errors.Is(err, hsmkey.ErrUnsupported) {
			t.Errorf("the error matches no sentinel: %v", err)
		}
	})
}
