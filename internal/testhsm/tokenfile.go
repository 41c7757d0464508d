package testhsm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// tokenFiles are the files that describe the tokens of an HSM, by path. SoftHSM2
// writes one anew at each login, not atomically: killed in the middle of it, it
// leaves an empty file and the token is lost, which does not happen to HSMs.
type tokenFiles map[string][]byte

func (h *HSM) tokenFiles(tb testing.TB) tokenFiles {
	tb.Helper()
	paths, err := filepath.Glob(filepath.Join(h.Dir, "tokens", "*", "token.object"))
	if err != nil {
		tb.Fatalf("testhsm: %v", err)
	}
	files := tokenFiles{}
	for _, path := range paths {
		if files[path], err = os.ReadFile(path); err != nil {
			tb.Fatalf("testhsm: %v", err)
		}
	}
	return files
}

// mend restores files that were not written to their end. Nothing may use the
// tokens meanwhile.
func (f tokenFiles) mend() error {
	var all error
	for path, content := range f {
		info, err := os.Stat(path)
		if err == nil && info.Size() < int64(len(content)) {
			err = os.WriteFile(path, content, 0o600)
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			all = errors.Join(all, fmt.Errorf("testhsm: %w", err))
		}
	}
	return all
}
