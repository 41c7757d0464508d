package testhsm

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// PKCS11Tool runs OpenSC's pkcs11-tool, logged in to the HSM's first token
// unless args name another by --token-label, and returns its standard output. It
// fails the test when the program fails. The PIN reaches it by its environment,
// never by its arguments.
//
// It is a process of its own: what it changes on the token, a module that is
// initialised in the test sees too.
func PKCS11Tool(tb testing.TB, h *HSM, args ...string) string {
	tb.Helper()
	tool := mustProgram(tb, "pkcs11-tool", "opensc")
	// Of an option that is given twice the last one counts.
	fixed := []string{"--module", h.Module, "--token-label", h.Labels[0], "--login", "--pin", "env:HSM_PIN"}
	cmd := exec.Command(tool, append(fixed, args...)...)
	cmd.Env = h.environ()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		tb.Fatalf("testhsm: pkcs11-tool %q: %v\n%s%s", args, err, stdout.Bytes(), stderr.Bytes())
	}
	return stdout.String()
}

// GenerateEC makes a P-256 key pair on the HSM's first token. The id is in
// hexadecimal digits, as CKA_ID.
func GenerateEC(tb testing.TB, h *HSM, label, id string) {
	tb.Helper()
	generate(tb, h, "EC:prime256v1", label, id)
}

// GenerateRSA makes an RSA key pair of 2048 bits on the HSM's first token.
func GenerateRSA(tb testing.TB, h *HSM, label, id string) {
	tb.Helper()
	generate(tb, h, "rsa:2048", label, id)
}

// GenerateEd25519 makes an Ed25519 key pair on the HSM's first token.
func GenerateEd25519(tb testing.TB, h *HSM, label, id string) {
	tb.Helper()
	generate(tb, h, "EC:edwards25519", label, id)
}

func generate(tb testing.TB, h *HSM, keyType, label, id string) {
	tb.Helper()
	PKCS11Tool(tb, h, "--keypairgen", "--key-type", keyType, "--label", label, "--id", id)
}

// Import puts a private key (RSA, ECDSA or Ed25519) and its public key on the
// HSM's first token: for published test vectors, and for the same key on
// several HSMs. The id is in hexadecimal digits.
func Import(tb testing.TB, h *HSM, key crypto.Signer, label, id string) {
	tb.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		tb.Fatalf("testhsm: import %q: %v", label, err)
	}
	path := filepath.Join(tempDir(tb), "key.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		tb.Fatalf("testhsm: import %q: %v", label, err)
	}
	cmd := exec.Command(mustProgram(tb, "softhsm2-util", "softhsm2"), "--module", h.Module, "--import", path,
		"--token", h.Labels[0], "--label", label, "--id", id, "--pin", PIN)
	cmd.Env = h.environ()
	if out, err := cmd.CombinedOutput(); err != nil {
		tb.Fatalf("testhsm: import %q: %v: %s", label, err, bytes.TrimSpace(out))
	}
}
