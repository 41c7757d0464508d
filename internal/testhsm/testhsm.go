// Package testhsm makes HSMs for tests: private SoftHSM2 tokens, a spy that
// counts the calls that reach them, and p11-kit servers that put them into
// other processes, where they can be stopped, killed and restarted.
//
// Nothing here is a stand-in: tests run on the real module, and a machine
// without it fails them with the name of the package to install. It never
// skips.
//
// # One process, one SoftHSM2
//
// SoftHSM2 reads its configuration, and with it the token directory, when it is
// initialised, once per process. New therefore sets SOFTHSM2_CONF for the whole
// process by tb.Setenv, and a test that uses it cannot be parallel. Whatever a
// test opened on the module must be closed before the test ends, so that the
// module is finalised and the next test's configuration is read. HSMs in
// processes of their own (Serve, Remote, Env) know no such limit: make them with
// NewDetached, as many as the test needs.
package testhsm

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const (
	// PIN is the user PIN of every token. It is distinctive, so that a test can
	// search output, logs and errors for it.
	PIN = "pin-8c1f27d0"

	// SOPIN is the security officer's PIN of every token.
	SOPIN = "so-pin-5e90ab34"

	// DefaultLabel is the label of the only token when no labels are given.
	DefaultLabel = "hsmkey-test"
)

// HSM is a private SoftHSM2 token directory.
type HSM struct {
	Module string   // path of the PKCS#11 library
	Conf   string   // path of softhsm2.conf, the value of SOFTHSM2_CONF
	Dir    string   // directory that holds everything that belongs to this HSM
	Labels []string // labels of its tokens, at least one
}

// New makes an HSM with one token per label (DefaultLabel without any) in a
// temporary directory of the test, and sets SOFTHSM2_CONF for this process until
// the test ends. See the package comment for what that means for other tests.
func New(tb testing.TB, labels ...string) *HSM {
	tb.Helper()
	h := NewDetached(tb, labels...)
	tb.Setenv("SOFTHSM2_CONF", h.Conf)
	return h
}

// NewDetached makes an HSM like New, but leaves the environment of this process
// alone: it is for other processes, which get it by Env, Serve or Remote.
func NewDetached(tb testing.TB, labels ...string) *HSM {
	tb.Helper()
	h, err := Create(tempDir(tb), labels...)
	if err != nil {
		tb.Fatal(err)
	}
	return h
}

// Create makes an HSM in dir, which must exist, without a test to belong to and
// without touching the environment: for TestMain and for script set-up functions.
func Create(dir string, labels ...string) (*HSM, error) {
	if len(labels) == 0 {
		labels = []string{DefaultLabel}
	}
	if strings.ContainsAny(dir, "#\n") {
		return nil, fmt.Errorf("testhsm: SoftHSM2 takes the rest of %q for a comment: use another directory", dir)
	}
	module := ModulePath()
	if module == "" {
		return nil, errors.New("testhsm: libsofthsm2.so not found: install the Debian package softhsm2 (or run `make deps`)")
	}
	util, err := program("softhsm2-util", "softhsm2")
	if err != nil {
		return nil, err
	}
	h := &HSM{
		Module: module,
		Conf:   filepath.Join(dir, "softhsm2.conf"),
		Dir:    dir,
		Labels: labels,
	}
	tokens := filepath.Join(dir, "tokens")
	if err := os.MkdirAll(tokens, 0o700); err != nil {
		return nil, fmt.Errorf("testhsm: %w", err)
	}
	conf := "directories.tokendir = " + tokens + "\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n"
	if err := os.WriteFile(h.Conf, []byte(conf), 0o600); err != nil {
		return nil, fmt.Errorf("testhsm: %w", err)
	}
	for _, label := range labels {
		cmd := exec.Command(util, "--module", module, "--init-token", "--free",
			"--label", label, "--so-pin", SOPIN, "--pin", PIN)
		cmd.Env = h.environ()
		if out, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("testhsm: make token %q: %w: %s", label, err, bytes.TrimSpace(out))
		}
	}
	return h, nil
}

// Env returns the variables that point a child process, ours or another one, to
// the first token of the HSM, as NAME=value. Append them to the child's own.
func (h *HSM) Env() []string {
	return []string{
		"SOFTHSM2_CONF=" + h.Conf,
		"HSM_MODULE=" + h.Module,
		"HSM_TOKEN=" + h.Labels[0],
		"HSM_PIN=" + PIN,
	}
}

// environ is this process's environment with that of the HSM on top.
func (h *HSM) environ() []string {
	return append(os.Environ(), h.Env()...)
}

// ModulePath returns the path of SoftHSM2's PKCS#11 library, searched in the
// usual places of Debian, Fedora, Alpine and macOS; empty when there is none.
func ModulePath() string {
	return firstFile(
		"/usr/lib/softhsm/libsofthsm2.so",
		"/usr/lib/*-linux-gnu*/softhsm/libsofthsm2.so",
		"/usr/lib64/softhsm/libsofthsm2.so",
		"/usr/lib64/pkcs11/libsofthsm2.so",
		"/usr/local/lib/softhsm/libsofthsm2.so",
		"/opt/homebrew/lib/softhsm/libsofthsm2.so",
	)
}

// firstFile returns the first file that one of the patterns matches, or "".
func firstFile(patterns ...string) string {
	for _, pattern := range patterns {
		// The only error is a malformed pattern, and ours are constants.
		matches, _ := filepath.Glob(pattern)
		for _, path := range matches {
			if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
				return path
			}
		}
	}
	return ""
}

// p11Module returns the path of a PKCS#11 library that is no token but wraps or
// forwards to one, such as pkcs11-spy.so, and fails the test if it is missing.
func p11Module(tb testing.TB, name, debianPackage string) string {
	tb.Helper()
	path := firstFile(
		"/usr/lib/*-linux-gnu*/pkcs11/"+name,
		"/usr/lib/*-linux-gnu*/"+name,
		"/usr/lib64/pkcs11/"+name,
		"/usr/lib64/"+name,
		"/usr/lib/pkcs11/"+name,
		"/usr/lib/"+name,
		"/usr/local/lib/"+name,
		"/opt/homebrew/lib/"+name,
	)
	if path == "" {
		tb.Fatalf("testhsm: %s not found: install the Debian package %s (or run `make deps`)", name, debianPackage)
	}
	return path
}

// privateCopy copies a PKCS#11 library into a directory of the test. The dynamic
// linker takes the copy for another library, so its state is its own: what an
// earlier test did with the library cannot matter.
func privateCopy(tb testing.TB, library string) string {
	tb.Helper()
	content, err := os.ReadFile(library)
	if err != nil {
		tb.Fatalf("testhsm: %v", err)
	}
	path := filepath.Join(tempDir(tb), filepath.Base(library))
	if err := os.WriteFile(path, content, 0o700); err != nil {
		tb.Fatalf("testhsm: %v", err)
	}
	return path
}

// tempDir makes a directory that lives as long as the test. Other than that of
// tb.TempDir its name does not contain the test's: that may be too long for a
// socket (107 bytes), and a subtest's "#" starts a comment in softhsm2.conf.
func tempDir(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "testhsm-")
	if err != nil {
		tb.Fatalf("testhsm: %v", err)
	}
	tb.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			tb.Errorf("testhsm: %v", err)
		}
	})
	return dir
}

// program finds an executable, also in the directories for administrators, which
// are not in everybody's PATH.
func program(name, debianPackage string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/opt/homebrew/bin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("testhsm: %s not found: install the Debian package %s (or run `make deps`)", name, debianPackage)
}

// mustProgram is program for tests.
func mustProgram(tb testing.TB, name, debianPackage string) string {
	tb.Helper()
	path, err := program(name, debianPackage)
	if err != nil {
		tb.Fatal(err)
	}
	return path
}

// tokenURI returns the PKCS#11 URI (RFC 7512) of the HSM's token with that label.
func tokenURI(label string) string {
	const unreserved = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
	var b strings.Builder
	b.WriteString("pkcs11:token=")
	for i := range len(label) {
		if c := label[i]; strings.IndexByte(unreserved, c) >= 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}
