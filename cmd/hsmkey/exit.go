package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jwk"
	"github.com/hsmkey/hsmkey/jws"
)

// The exit statuses. Scripts rely on them.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2 // usage, input that is refused unseen by the HSM, configuration
	exitPIN         = 3
	exitKey         = 4 // not found, ambiguous, another one
	exitSession     = 5 // the HSM is down, or too slow
	exitVerify      = 6 // the token does not verify
	exitInterrupted = 130
)

// statuses are in the order in which they count: a key is "not found" only if
// every HSM could be asked.
var statuses = []struct {
	sentinel error
	status   int
	hint     string
}{
	{jws.ErrVerify, exitVerify, "do not trust what it says"},
	{hsmkey.ErrPIN, exitPIN, "--pin-file and HSM_PIN_FILE name a file with the PIN in it, HSM_PIN is the PIN; without them there is a prompt. A wrong one is sent once"},
	{hsmkey.ErrTimeout, exitSession, "is the HSM up? --timeout gives it longer"},
	{hsmkey.ErrSession, exitSession, "is the HSM up? --verbose shows what happens"},
	{hsmkey.ErrClosed, exitSession, ""},
	{hsmkey.ErrKeyNotFound, exitKey, "`hsmkey key list` shows the keys of the token"},
	{hsmkey.ErrAmbiguous, exitKey, "`hsmkey key list` shows the ids; choose a key with --id"},
	{hsmkey.ErrKeyMismatch, exitKey, "`hsmkey key list` shows the keys of the token"},
	{hsmkey.ErrConfig, exitUsage, "`hsmkey --help` lists the flags and variables"},
	{hsmkey.ErrInvalid, exitUsage, ""},
	{jws.ErrClaims, exitUsage, `claims are one JSON object, such as '{"sub":"alice"}'`},
	{jwk.ErrPrivate, exitUsage, ""},
	{hsmkey.ErrExists, exitFailed, "choose another label or id, or remove the key first with `hsmkey key delete`"},
	{hsmkey.ErrUnsupported, exitFailed, "`hsmkey key list` shows what each key is, and the algorithms that it signs with"},
}

// exitStatus is what an error makes the process end with.
func exitStatus(err error) int {
	if errors.As(err, new(*usageError)) {
		return exitUsage
	}
	for _, s := range statuses {
		if errors.Is(err, s.sentinel) {
			return s.status
		}
	}
	if errors.Is(err, context.Canceled) {
		return exitInterrupted
	}
	return exitFailed
}

// hintFor is the advice that an error of a command carries, or the usual one for
// its kind.
func hintFor(command string, err error) string {
	if h := (*hinted)(nil); errors.As(err, &h) {
		return h.hint
	}
	if !errors.As(err, new(*usageError)) {
		for _, s := range statuses {
			if errors.Is(err, s.sentinel) && s.hint != "" {
				return s.hint
			}
		}
	}
	if exitStatus(err) == exitUsage {
		return fmt.Sprintf("`%s --help` shows how", command)
	}
	return ""
}

// message is an error in words.
func message(err error) string {
	if exitStatus(err) == exitInterrupted {
		return "interrupted"
	}
	return err.Error()
}

// usageError is a mistake in flags or arguments.
type usageError struct{ error }

func (u *usageError) Unwrap() error { return u.error }

// usagef is for mistakes that a command finds itself.
func usagef(format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...)}
}
