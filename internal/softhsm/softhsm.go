// Package softhsm makes private SoftHSM2 tokens for development, the ones of
// `hsmkey init`, and finds them again.
//
// A token lives in a directory of its own (mode 0700), complete or not at all:
//
//	softhsm2.conf   what SOFTHSM2_CONF points to; also says which token it is
//	pin             the user PIN, random, mode 0600
//	so-pin          the security officer's PIN, random, mode 0600
//	tokens/         SoftHSM2's own
package softhsm

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// ErrNone says that there is no token of ours in the directory.
var ErrNone = errors.New("no development token")

// Token is a development token.
type Token struct {
	Dir   string // absolute
	Label string
}

// Conf returns the path of the configuration, the value of SOFTHSM2_CONF.
func (t Token) Conf() string { return filepath.Join(t.Dir, "softhsm2.conf") }

// PINFile returns the path of the file that holds the user PIN.
func (t Token) PINFile() string { return filepath.Join(t.Dir, "pin") }

func (t Token) soPINFile() string { return filepath.Join(t.Dir, "so-pin") }
func (t Token) store() string     { return filepath.Join(t.Dir, "tokens") }

// The configuration begins with these lines, comments to SoftHSM2. They name no
// library: one that a directory names would be run by whoever works there.
const (
	confMark  = "# Made by hsmkey init for a development token; it writes this file anew."
	confToken = "# token: "
)

// conf renders the configuration.
func (t Token) conf() []byte {
	return []byte(confMark + "\n" +
		confToken + t.Label + "\n" +
		"directories.tokendir = " + t.store() + "\n" +
		"objectstore.backend = file\n" +
		"log.level = ERROR\n" +
		"slots.removable = false\n")
}

// Find returns the token that [Make] made in a directory. The error matches
// ErrNone if there is none, and sessionpool.ErrConfig if there is one that
// cannot be used as it is, because the directory was moved or its
// configuration was edited; Make repairs that.
func Find(dir string) (Token, error) {
	t, conf, err := read(dir)
	if err != nil {
		return Token{}, err
	}
	if !bytes.Equal(conf, t.conf()) {
		return Token{}, fmt.Errorf("%w: %s was edited, or its directory was moved", sessionpool.ErrConfig, t.Conf())
	}
	return t, nil
}

// read returns the token that a configuration speaks of, and the configuration.
func read(dir string) (Token, []byte, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return Token{}, nil, err
	}
	t := Token{Dir: abs}
	conf, err := os.ReadFile(t.Conf())
	if errors.Is(err, fs.ErrNotExist) {
		return Token{}, nil, fmt.Errorf("%w in %s", ErrNone, dir)
	}
	if err != nil {
		return Token{}, nil, err
	}
	lines := strings.SplitN(string(conf), "\n", 3)
	if len(lines) < 3 || lines[0] != confMark {
		return Token{}, nil, fmt.Errorf("%w in %s: softhsm2.conf is somebody else's", ErrNone, dir)
	}
	var named bool
	if t.Label, named = strings.CutPrefix(lines[1], confToken); !named {
		return Token{}, nil, fmt.Errorf("%w in %s: softhsm2.conf does not name its token", ErrNone, dir)
	}
	return t, conf, nil
}

// maxLabel is the room for a label in CK_TOKEN_INFO, in bytes.
const maxLabel = 32

// CheckLabel refuses labels that a token cannot have, or that would not be
// found again.
func CheckLabel(label string) error {
	switch {
	case label == "" || len(label) > maxLabel:
		return fmt.Errorf("%w: a token's label has 1 to %d bytes", sessionpool.ErrConfig, maxLabel)
	case !utf8.ValidString(label) || strings.ContainsFunc(label, func(r rune) bool { return !unicode.IsPrint(r) }):
		return fmt.Errorf("%w: the token's label is not plain text", sessionpool.ErrConfig)
	case strings.TrimSpace(label) != label:
		return fmt.Errorf("%w: the token's label begins or ends with a space", sessionpool.ErrConfig)
	}
	return nil
}

// maxPath bounds paths in softhsm2.conf, which SoftHSM2 reads in lines of 1024
// bytes.
const maxPath = 900

// checkDir refuses directories that cannot be written into softhsm2.conf, where
// "#" begins a comment, a second "=" ends the value, and nothing can be quoted.
func checkDir(dir string) error {
	var trouble string
	switch {
	case strings.ContainsAny(dir, "#=\n\r"):
		trouble = `"#", "=" and line breaks cannot be written into its configuration`
	case strings.TrimSpace(dir) != dir:
		trouble = "a space at the end cannot be written into its configuration"
	case len(dir) > maxPath:
		trouble = "the path is too long for its configuration"
	default:
		return nil
	}
	return fmt.Errorf("%w: SoftHSM2 cannot work in %q: %s", sessionpool.ErrConfig, dir, trouble)
}
