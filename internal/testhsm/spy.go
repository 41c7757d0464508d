package testhsm

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

// spiedCall is how pkcs11-spy begins its record of a call: a running number, the
// function's name, and the time on the next line.
var spiedCall = regexp.MustCompile(`(?m)^\d+: (C_\w+)$`)

// Spy puts OpenSC's pkcs11-spy in front of the HSM's module: load modulePath in
// place of h.Module, and calls("C_Login") is the number of times that C_Login
// was called through it so far, by this process and by children that inherit
// its environment and load the same path. It counts what reaches the module,
// whatever the code under test believes it called.
//
// Spy sets PKCS11SPY and PKCS11SPY_OUTPUT until the test ends. Like New, it
// cannot be used by parallel tests. The path is private to the test.
func Spy(tb testing.TB, h *HSM) (modulePath string, calls func(function string) int) {
	tb.Helper()
	// The spy opens its log and its module once, when it is loaded first.
	modulePath = privateCopy(tb, p11Module(tb, "pkcs11-spy.so", "opensc"))
	log := filepath.Join(tempDir(tb), "spy.log")
	tb.Setenv("PKCS11SPY", h.Module)
	tb.Setenv("PKCS11SPY_OUTPUT", log)

	return modulePath, func(function string) int {
		tb.Helper()
		content, err := os.ReadFile(log)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			tb.Errorf("testhsm: spy: %v", err)
		}
		n := 0
		for _, match := range spiedCall.FindAllSubmatch(content, -1) {
			if string(match[1]) == function {
				n++
			}
		}
		return n
	}
}
