package sessionpool

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Defaults of Config, for the fields that are zero.
const (
	DefaultIdleTimeout = 4 * time.Minute
	DefaultOpTimeout   = 10 * time.Second
	DefaultMaxSessions = 16
	DefaultMaxOrphans  = 16
)

// Bounds of Config: beyond them a number is a mistake, not a wish.
const (
	maxSessionsBound = 65536
	maxDuration      = 24 * time.Hour
)

// Config describes one token and how to hold sessions on it. The zero value of
// every field but Module is usable. A Config may be used for several pools.
type Config struct {
	// Module is the path of the PKCS#11 library. A name without a slash that is
	// no file in the working directory is left to the system's loader.
	Module string

	// ModuleArgs is the initialisation string that some modules want in
	// C_Initialize (NSS: "configdir='sql:/etc/pki/nssdb' ...").
	ModuleArgs string

	// ModuleEnv holds NAME=value pairs that are set in the environment of the
	// process while the module initialises. It needs Private.
	ModuleEnv []string

	// Private gives this pool an instance of the library of its own, loaded
	// from a private copy of the file, with its own state: it can fail, hang
	// and be initialised again without touching other users of the library.
	Private bool

	// TokenLabel, TokenSerial and Slot choose the token; those that are set
	// must all match. With none, the only token with a user PIN is taken.
	TokenLabel  string
	TokenSerial string
	Slot        *uint

	// PIN reads the user PIN when a login is due; nil: sessions are public
	// (never logged in). See [StaticPIN] and [PINFile].
	PIN PINSource

	// PINGuard remembers rejected PINs. Pools that share a guard send a wrong
	// PIN once in all. Nil: pools on the same token share one.
	PINGuard *PINGuard

	// MaxSessions limits the physical sessions that the pools of this process
	// have open on the token, idle ones included, beside the one that anchors
	// the login. Zero: the token's own limit, else DefaultMaxSessions.
	// Of pools that share a token the smallest number holds.
	MaxSessions int

	// IdleTimeout is how long an unused session stays in the cache before it is
	// closed physically. Zero: DefaultIdleTimeout.
	// Of pools that share a token the shortest holds.
	IdleTimeout time.Duration

	// OpTimeout limits each PKCS#11 call. Zero: DefaultOpTimeout.
	OpTimeout time.Duration

	// Direct makes PKCS#11 calls on the goroutine of the caller, those that
	// initialise and finalise the library too, and those of [Module.SignLots] on a
	// thread beside it, not on goroutines of the pool's own: that saves handing each
	// call over and back, and a call that hangs holds its caller, whatever OpTimeout
	// and its context say. It is for libraries that compute in this process and have
	// no device to wait for. For SoftHSM2 and NSS softokn it is set by itself, unless
	// Wrap is. Of pools that share a library the first one's holds for what they do
	// to the library itself: load, search, initialise, finalise.
	Direct bool

	// MaxOrphans limits the sessions whose caller left during a call that goes
	// on in the module. At the limit Acquire waits until one comes back, and
	// fails at once when all of them last for longer than OpTimeout.
	// Zero: DefaultMaxOrphans.
	MaxOrphans int

	// DisableCache closes each session physically when it is released.
	DisableCache bool

	// Plaintext says that the way to the HSM is not encrypted: sessions of this
	// pool are not given to those who ask for [Encrypted].
	Plaintext bool

	// Name is how the HSM is called in errors and events; pools with one name are
	// one HSM for [Avoid]. Empty: the token's label and the library.
	Name string

	// OnEvent, when set, is told what happens to sessions, logins and modules.
	// It is called without locks held and must return soon.
	OnEvent func(Event)

	// Wrap, when set, decorates the library as soon as it is loaded; it is how
	// tests inject faults. Of pools that share a library the first one's holds.
	Wrap func(Module) Module
}

// Check reports what [New] would refuse whatever the module: numbers out of range
// and settings that contradict each other. The error matches [ErrConfig].
func (c Config) Check() error {
	bad := func(format string, args ...any) error { return fail(ErrConfig, nil, format, args...) }
	switch {
	case c.MaxSessions < 0 || c.MaxSessions > maxSessionsBound:
		return bad("MaxSessions is %d, want 0 (default) to %d", c.MaxSessions, maxSessionsBound)
	case c.MaxOrphans < 0 || c.MaxOrphans > maxSessionsBound:
		return bad("MaxOrphans is %d, want 0 (default) to %d", c.MaxOrphans, maxSessionsBound)
	case c.IdleTimeout < 0 || c.IdleTimeout > maxDuration:
		return bad("IdleTimeout is %v, want 0 (default) to %v", c.IdleTimeout, maxDuration)
	case c.OpTimeout < 0 || c.OpTimeout > maxDuration:
		return bad("OpTimeout is %v, want 0 (default) to %v", c.OpTimeout, maxDuration)
	case len(c.ModuleEnv) > 0 && !c.Private:
		return bad("ModuleEnv needs Private: a shared library is initialised once for all")
	}
	for _, pair := range c.ModuleEnv {
		if name, _, ok := strings.Cut(pair, "="); !ok || name == "" || strings.ContainsRune(pair, 0) {
			return bad("ModuleEnv holds an entry that is not NAME=value")
		}
	}
	return nil
}

// withDefaults checks every field and fills in defaults.
func (c Config) withDefaults() (Config, error) {
	if err := c.Check(); err != nil {
		return Config{}, err
	}
	if c.Module == "" {
		return Config{}, fail(ErrConfig, nil, "no PKCS#11 library is configured (set HSM_MODULE or --module)")
	}
	path, err := modulePath(c.Module)
	if err != nil {
		return Config{}, err
	}
	c.Module = path
	c.Direct = c.Direct || c.Wrap == nil && slices.Contains(inProcess, filepath.Base(path))
	c.TokenLabel = strings.TrimRight(c.TokenLabel, " ")
	c.IdleTimeout = cmp.Or(c.IdleTimeout, DefaultIdleTimeout)
	c.OpTimeout = cmp.Or(c.OpTimeout, DefaultOpTimeout)
	c.MaxOrphans = cmp.Or(c.MaxOrphans, DefaultMaxOrphans)
	return c, nil
}

// inProcess are the libraries that are their own HSM.
var inProcess = []string{"libsofthsm2.so", "libsoftokn3.so"}

// modulePath is the real path of a library, so that one file is one library
// under whatever name. A bare name that is no file is the loader's business.
func modulePath(module string) (string, error) {
	info, err := os.Stat(module) // its error names the whole path
	if errors.Is(err, os.ErrNotExist) && !strings.ContainsRune(module, filepath.Separator) {
		return module, nil
	}
	if err != nil {
		return "", fail(ErrConfig, err, "cannot read the PKCS#11 library")
	}
	if !info.Mode().IsRegular() {
		return "", fail(ErrConfig, nil, "the PKCS#11 library %s is not a file", module)
	}
	path, err := filepath.Abs(module)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return "", fail(ErrConfig, err, "cannot read the PKCS#11 library")
	}
	return path, nil
}

// matches reports whether a token is the one that the configuration names.
func (c *Config) matches(t TokenInfo) bool {
	return (c.TokenLabel == "" || c.TokenLabel == t.Label) &&
		(c.TokenSerial == "" || c.TokenSerial == t.Serial) &&
		(c.Slot == nil || *c.Slot == t.Slot)
}

// selector is the token choice in words.
func (c *Config) selector() string {
	var parts []string
	if c.TokenLabel != "" {
		parts = append(parts, fmt.Sprintf("label %q", c.TokenLabel))
	}
	if c.TokenSerial != "" {
		parts = append(parts, fmt.Sprintf("serial %q", c.TokenSerial))
	}
	if c.Slot != nil {
		parts = append(parts, fmt.Sprintf("slot %d", *c.Slot))
	}
	return strings.Join(parts, " and ")
}
