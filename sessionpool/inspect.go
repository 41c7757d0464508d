package sessionpool

import (
	"context"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"
)

// LibraryInfo is what a PKCS#11 library says about itself (PKCS#11 v2.40,
// CK_INFO), and its slots.
type LibraryInfo struct {
	Path         string // the real one
	Description  string
	Manufacturer string
	Version      string // of the library, such as 2.6
	Cryptoki     string // version of PKCS#11, such as 2.40
	Slots        []SlotInfo
}

// SlotInfo is a slot of a library.
type SlotInfo struct {
	Slot        uint
	Description string
	Token       *TokenInfo // nil: the slot is empty, or Err is set
	Err         error      // why the slot, or its token, does not answer
}

// Initialized reports whether the token was given a label and an SO PIN.
func (t TokenInfo) Initialized() bool { return t.Flags&pkcs11.CKF_TOKEN_INITIALIZED != 0 }

// Inspect loads a library, if nobody has, and asks it for its slots and tokens.
// Of cfg it uses what concerns the library. Nobody is logged in. It takes about
// Config.OpTimeout at most, unless the library is [Config.Direct].
//
// Errors match [ErrConfig] when the library cannot be loaded, [ErrSession] or
// [ErrTimeout] when it does not initialise or does not answer.
func Inspect(ctx context.Context, cfg Config) (LibraryInfo, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return LibraryInfo{}, err
	}
	l, err := openLibrary(&cfg)
	if err != nil {
		return LibraryInfo{}, err
	}
	info, err := l.inspect(ctx, &cfg)
	return info, errors.Join(err, l.release(ctx, cfg.OpTimeout))
}

func (l *library) inspect(ctx context.Context, cfg *Config) (LibraryInfo, error) {
	in, _, err := l.use(ctx, cfg.OpTimeout)
	if err != nil {
		return LibraryInfo{}, err
	}
	return await(ctx, in.direct, cfg.OpTimeout, "asking the PKCS#11 library for its slots", func() (LibraryInfo, error) {
		if err := in.enter(); err != nil {
			return LibraryInfo{}, err
		}
		defer in.leave()
		return inspect(in.module, cfg.Module)
	})
}

func inspect(m Module, path string) (LibraryInfo, error) {
	ci, err := m.GetInfo()
	if err != nil {
		return LibraryInfo{}, fail(ErrSession, err, "the PKCS#11 library %s does not describe itself", path)
	}
	info := LibraryInfo{
		Path: path, Description: trim(ci.LibraryDescription), Manufacturer: trim(ci.ManufacturerID),
		Version: version(ci.LibraryVersion), Cryptoki: version(ci.CryptokiVersion),
	}
	slots, err := m.GetSlotList(false)
	if err != nil {
		return info, fail(ErrSession, err, "the slots of %s cannot be listed", path)
	}
	for _, slot := range slots {
		s := SlotInfo{Slot: slot}
		var si pkcs11.SlotInfo
		if si, s.Err = m.GetSlotInfo(slot); s.Err == nil {
			s.Description = trim(si.SlotDescription)
			if si.Flags&pkcs11.CKF_TOKEN_PRESENT != 0 {
				s.Token, s.Err = tokenIn(m, slot)
			}
		}
		info.Slots = append(info.Slots, s)
	}
	return info, nil
}

// tokenIn reads the token in a slot; nil if there is none any more.
func tokenIn(m Module, slot uint) (*TokenInfo, error) {
	ti, err := m.GetTokenInfo(slot)
	if isCode(err, pkcs11.CKR_TOKEN_NOT_PRESENT) {
		return nil, nil
	}
	if err != nil {
		return nil, fail(ErrSession, err, "slot %d", slot)
	}
	info := newTokenInfo(slot, ti)
	return &info, nil
}

func version(v pkcs11.Version) string { return fmt.Sprintf("%d.%d", v.Major, v.Minor) }
