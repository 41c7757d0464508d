package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/hsmkey/hsmkey"
)

// PINOrigin says where the PIN comes from.
type PINOrigin struct {
	Words string // such as "HSM_PIN"; never the PIN itself
	File  string // path of the file that holds it, if one does
}

// checkPINSource looks at where a PIN comes from, not at the PIN.
func (c *checks) checkPINSource(origin PINOrigin) {
	const name = "PIN source"
	if origin.File == "" {
		c.ok(name, "%s", origin.Words)
		return
	}
	at := origin.File
	if origin.Words != "" {
		at = origin.Words + ": " + origin.File
	}
	exposed, err := readableByOthers(origin.File)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !strings.ContainsRune(origin.File, filepath.Separator):
		// As in errors of a login: whose name this is may be a PIN.
		c.fail(name, failure(hsmkey.ErrPIN, withoutPath(err), "the PIN file, whose name is not shown"), "write the PIN to a file of mode 0600, and name that file")
	case err != nil:
		c.fail(name, failure(hsmkey.ErrPIN, withoutPath(err), "%s", at), "write the PIN to a file of mode 0600, and name that file")
	case exposed != "":
		c.warn(name, "chmod 600 "+origin.File, "%s: %s", at, exposed)
	default:
		c.ok(name, "%s", at)
	}
}

// readableByOthers says who else than its owner may read or change a file. It
// does not open it: a pipe can be read once.
func readableByOthers(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if info.IsDir() {
		return "", errors.New("is a directory")
	}
	var who string
	switch mode := info.Mode().Perm(); {
	case mode&0o006 != 0:
		who = "everybody on this machine"
	case mode&0o060 != 0:
		who = "its group"
	default:
		return "", nil
	}
	return fmt.Sprintf("%s may read or change it (mode %04o)", who, info.Mode().Perm()), nil
}

func withoutPath(err error) error {
	if pathErr := (*fs.PathError)(nil); errors.As(err, &pathErr) {
		return pathErr.Err
	}
	return err
}
