package softhsm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/sessionpool"
)

const confVariable = "SOFTHSM2_CONF"

// withModule runs fn with the SoftHSM2 library at work on the token's directory.
// Any other library is refused before it was asked for more than its name: this
// package initialises tokens, which erases them.
func (t Token) withModule(module string, fn func(*pkcs11.Ctx) error) (err error) {
	restore, err := setenv(confVariable, t.Conf())
	if err != nil {
		return err
	}
	defer restore()
	m := pkcs11.New(module)
	if m == nil {
		return fmt.Errorf("%w: cannot load the PKCS#11 library %q", sessionpool.ErrConfig, module)
	}
	if err := m.Initialize(); err != nil {
		return fmt.Errorf("the PKCS#11 library %s does not initialise: %w", module, err)
	}
	defer func() { err = errors.Join(err, m.Finalize()) }()
	info, err := m.GetInfo()
	if err != nil {
		return fmt.Errorf("asking the PKCS#11 library %s for its name: %w", module, err)
	}
	if !strings.HasPrefix(info.ManufacturerID, "SoftHSM") {
		return fmt.Errorf("%w: development tokens are made with SoftHSM2; %s is a library of %q", sessionpool.ErrConfig, module, strings.TrimSpace(info.ManufacturerID))
	}
	return fn(m)
}

func setenv(name, value string) (restore func(), err error) {
	old, was := os.LookupEnv(name)
	if err := os.Setenv(name, value); err != nil {
		return nil, err
	}
	return func() {
		if was {
			_ = os.Setenv(name, old)
		} else {
			_ = os.Unsetenv(name)
		}
	}, nil
}

// initialise makes the token, with its two PINs. They reach the library in
// memory, never as arguments of a process.
func (t Token) initialise(ctx context.Context, module, pin, soPIN string) error {
	return t.withModule(module, func(m *pkcs11.Ctx) error {
		slot, err := freeSlot(m)
		if err != nil {
			return err
		}
		if err := m.InitToken(slot, soPIN, t.Label); err != nil {
			return fmt.Errorf("making the token: %w", err)
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("making the token: %w", context.Cause(ctx))
		}
		// SoftHSM2 gives an initialised token another slot.
		if slot, _, err = t.find(m); err != nil {
			return err
		}
		s, err := m.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		if err != nil {
			return fmt.Errorf("opening the new token: %w", err)
		}
		if err := m.Login(s, pkcs11.CKU_SO, soPIN); err != nil {
			return fmt.Errorf("logging in to the new token: %w", err)
		}
		if err := m.InitPIN(s, pin); err != nil {
			return fmt.Errorf("setting the user PIN: %w", err)
		}
		return m.CloseSession(s) // and with the last session, the login
	})
}

// freeSlot returns the slot for a new token. There must be no other token: the
// directory is new, so one that shows would be in a place that is not ours.
func freeSlot(m *pkcs11.Ctx) (uint, error) {
	slots, err := m.GetSlotList(true)
	if err != nil {
		return 0, fmt.Errorf("listing slots: %w", err)
	}
	var free []uint
	for _, slot := range slots {
		info, err := m.GetTokenInfo(slot)
		if err != nil {
			return 0, fmt.Errorf("looking at slot %d: %w", slot, err)
		}
		if info.Flags&pkcs11.CKF_TOKEN_INITIALIZED != 0 {
			return 0, fmt.Errorf("%w: SoftHSM2 shows the token %q where a new one belongs; does it read %s?",
				sessionpool.ErrConfig, strings.TrimSpace(info.Label), confVariable)
		}
		free = append(free, slot)
	}
	if len(free) == 0 {
		return 0, errors.New("SoftHSM2 has no free slot")
	}
	return free[0], nil
}

// check looks whether the token is there, without a login.
func (t Token) check(module string) error {
	return t.withModule(module, func(m *pkcs11.Ctx) error {
		_, info, err := t.find(m)
		if err != nil {
			return err
		}
		if info.Flags&pkcs11.CKF_USER_PIN_INITIALIZED == 0 {
			return fmt.Errorf("%w: the token in %s is incomplete: it has no user PIN", sessionpool.ErrConfig, t.Dir)
		}
		return nil
	})
}

// find returns the slot of the token.
func (t Token) find(m *pkcs11.Ctx) (uint, pkcs11.TokenInfo, error) {
	slots, err := m.GetSlotList(true)
	if err != nil {
		return 0, pkcs11.TokenInfo{}, fmt.Errorf("listing slots: %w", err)
	}
	for _, slot := range slots {
		info, err := m.GetTokenInfo(slot)
		if err == nil && info.Flags&pkcs11.CKF_TOKEN_INITIALIZED != 0 && strings.TrimRight(info.Label, " ") == t.Label {
			return slot, info, nil
		}
	}
	return 0, pkcs11.TokenInfo{}, fmt.Errorf("%w: the token in %s is incomplete: there is no token %q in %s",
		sessionpool.ErrConfig, t.Dir, t.Label, t.store())
}
