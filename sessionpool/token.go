package sessionpool

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/miekg/pkcs11"
)

// TokenInfo is what a token says about itself (PKCS#11 v2.40, CK_TOKEN_INFO),
// without the padding of its strings.
type TokenInfo struct {
	Label, Serial, Manufacturer, Model string

	Slot           uint
	Flags          uint // CKF_LOGIN_REQUIRED, CKF_USER_PIN_INITIALIZED, ...
	MinPIN, MaxPIN uint // bytes
	MaxSessions    uint // 0: the token does not say
}

// Token is one token of one library, shared by every pool of the process that
// uses it: its login, its cached sessions, its limits. A *Token identifies the
// token for as long as a pool on it is open. It is safe for concurrent use.
type Token struct {
	library *library
	name    string
	epoch   atomic.Uint64
	login   login
	cache   cache
	members members
	sweeper sweeper
	counts  counters

	// suspicion grows when a session was found dead: sessions that were put
	// into the cache before are asked for their state before they are reused.
	suspicion atomic.Uint64
	// resets counts Pool.Reset: older sessions are not reused.
	resets atomic.Uint64
	// failures counts device errors in a row, without a call that worked.
	failures atomic.Int32
	// running counts the goroutines of sessions, aside all that goes on beside the
	// callers: these, sweeps, and what pools do later.
	running sync.WaitGroup
	aside   atomic.Int64

	mu         sync.Mutex
	info       TokenInfo
	mechanisms []uint
	found      uint64 // library generation in which info and mechanisms were read
}

// Name is the token in words, for errors and events.
func (t *Token) Name() string { return t.name }

// sameHSM reports whether two tokens are one HSM, seen perhaps through several
// instances of a library.
func (t *Token) sameHSM(other *Token) bool { return t == other || t.name == other.name }

// Info returns what the token said about itself when it was last found.
func (t *Token) Info() TokenInfo {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.info
}

// Epoch grows with each login and each initialisation of the module: what was
// proven about objects on the token before is to be proven again.
func (t *Token) Epoch() uint64 { return t.epoch.Load() }

// Supports reports whether the token lists a mechanism. Lists are not always
// honest; a token that lists nothing is taken to support all.
func (t *Token) Supports(mechanism uint) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.mechanisms) == 0 || slices.Contains(t.mechanisms, mechanism)
}

// joinToken finds the token that the configuration names, and enters the pool
// among its users.
func joinToken(ctx context.Context, l *library, p *Pool) (*Token, error) {
	found, err := l.find(ctx, &p.cfg, func(in *instance, _ uint64) (foundToken, error) {
		return await(ctx, in.direct, p.cfg.OpTimeout, "looking for the token", func() (foundToken, error) {
			if err := in.enter(); err != nil {
				return foundToken{}, fail(ErrSession, err, "looking for the token")
			}
			defer in.leave()
			return findToken(in.module, &p.cfg, ErrConfig)
		})
	})
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.used = true
	t := l.token(&p.cfg, found.info)
	if t == nil {
		name := p.cfg.Name
		if name == "" {
			name = fmt.Sprintf("token %q (%s)", found.info.Label, filepath.Base(l.path))
		}
		t = &Token{library: l, name: name}
		l.tokens[t] = struct{}{}
	}
	t.adopt(found)
	t.members.add(p)
	t.applyLimits(p)
	return t, nil
}

// token is the one that a search found, if a pool uses it already. Slots may be
// numbered anew when somebody initialises the library, tokens keep their label
// and serial; only who names the slot may mean one of two with the same. The
// caller holds l.mu.
func (l *library) token(cfg *Config, found TokenInfo) *Token {
	for t := range l.tokens {
		info := t.Info()
		if info.Label == found.Label && info.Serial == found.Serial && (cfg.Slot == nil || info.Slot == found.Slot) {
			return t
		}
	}
	return nil
}

// adopt takes over what a search found out about the token.
func (t *Token) adopt(found foundToken) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.found != found.generation {
		t.epoch.Add(1)
	}
	t.info, t.mechanisms, t.found = found.info, found.mechanisms, found.generation
}

// locate returns the slot of the token in the present generation of its
// library; it looks again when the library was initialised anew, or when again
// says that the slot no longer answers.
func (t *Token) locate(ctx context.Context, cfg *Config, again bool) (in *instance, generation uint64, slot uint, err error) {
	in, generation, err = t.library.use(ctx, cfg.OpTimeout)
	if err != nil {
		return nil, 0, 0, err
	}
	t.mu.Lock()
	info, current := t.info, t.found == generation
	t.mu.Unlock()
	if current && !again {
		return in, generation, info.Slot, nil
	}
	same := Config{TokenLabel: info.Label, TokenSerial: info.Serial, OpTimeout: cfg.OpTimeout, Module: cfg.Module}
	found, err := t.library.find(ctx, &same, func(in *instance, generation uint64) (foundToken, error) {
		return t.search(ctx, cfg, in, generation, &same)
	})
	if err != nil {
		return nil, 0, 0, err
	}
	t.adopt(found)
	return found.instance, found.generation, found.info.Slot, nil
}

// search looks for the token on a goroutine like that of a session, so that a
// search that hangs is an orphan, too.
func (t *Token) search(ctx context.Context, cfg *Config, in *instance, generation uint64, same *Config) (foundToken, error) {
	worker := t.newPhysical(0, in, generation, in.direct)
	found := new(foundToken) // the step's alone, for as long as it may go on
	err, left := worker.call(ctx, cfg.OpTimeout, work{step: func() (err error) {
		*found, err = findToken(&worker.guard, same, ErrSession)
		return err
	}})
	if left {
		return foundToken{}, err
	}
	close(worker.work)
	return *found, err
}

// foundToken is the outcome of a search.
type foundToken struct {
	instance   *instance
	generation uint64
	info       TokenInfo
	mechanisms []uint
}

// find looks for a token, and initialises a library that somebody finalised.
func (l *library) find(ctx context.Context, cfg *Config, search func(*instance, uint64) (foundToken, error)) (foundToken, error) {
	for try := 1; ; try++ {
		in, generation, err := l.use(ctx, cfg.OpTimeout)
		if err != nil {
			return foundToken{}, err
		}
		found, err := search(in, generation)
		if classify(err) == moduleLost && try == 1 {
			if !errors.Is(err, errShut) {
				l.lost(generation)
			}
			continue
		}
		found.instance, found.generation = in, generation
		return found, err
	}
}

// findToken looks for the one token that cfg names. Slots that are empty,
// uninitialised or do not answer never hide another one. That no token, or
// several match is an error of the kind none: at first the configuration is to
// blame, later the HSM.
func findToken(m Module, cfg *Config, none error) (foundToken, error) {
	tokens, odd, err := listTokens(m)
	if err != nil {
		return foundToken{}, fail(ErrSession, err, "the slots of %s cannot be listed", cfg.Module)
	}
	info, err := chooseToken(tokens, odd, cfg, none)
	if err != nil {
		return foundToken{}, err
	}
	found := foundToken{info: info}
	// A module that cannot list its mechanisms is asked for them one by one as
	// they are used.
	list, _ := m.GetMechanismList(info.Slot)
	for _, mechanism := range list {
		found.mechanisms = append(found.mechanisms, mechanism.Mechanism)
	}
	return found, nil
}

// listTokens reads every initialised token, and collects what went wrong with
// slots that have one but do not answer.
func listTokens(m Module) (tokens []TokenInfo, odd error, err error) {
	slots, err := m.GetSlotList(true)
	if err != nil {
		return nil, nil, err
	}
	for _, slot := range slots {
		ti, err := m.GetTokenInfo(slot)
		if isCode(err, pkcs11.CKR_TOKEN_NOT_PRESENT) {
			continue
		}
		if err != nil {
			odd = errors.Join(odd, fmt.Errorf("slot %d: %w", slot, err))
			continue
		}
		if ti.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			continue
		}
		tokens = append(tokens, newTokenInfo(slot, ti))
	}
	return tokens, odd, nil
}

func newTokenInfo(slot uint, ti pkcs11.TokenInfo) TokenInfo {
	info := TokenInfo{
		Label: trim(ti.Label), Serial: trim(ti.SerialNumber),
		Manufacturer: trim(ti.ManufacturerID), Model: trim(ti.Model),
		Slot: slot, Flags: ti.Flags, MinPIN: ti.MinPinLen, MaxPIN: ti.MaxPinLen,
	}
	if ti.MaxSessionCount != unavailable {
		info.MaxSessions = ti.MaxSessionCount
	}
	return info
}

// trim removes the padding of PKCS#11 strings, blanks or, wrongly, zeros.
func trim(s string) string { return strings.TrimRight(s, " \x00") }

func chooseToken(tokens []TokenInfo, odd error, cfg *Config, none error) (TokenInfo, error) {
	wanted := cfg.selector()
	if errors.Is(none, ErrSession) {
		// It was there before.
		odd = errors.Join(pkcs11.Error(pkcs11.CKR_TOKEN_NOT_PRESENT), odd)
	}
	var matches, withPIN []TokenInfo
	for _, t := range tokens {
		if cfg.matches(t) {
			matches = append(matches, t)
			if t.Flags&pkcs11.CKF_USER_PIN_INITIALIZED != 0 {
				withPIN = append(withPIN, t)
			}
		}
	}
	if len(matches) > 1 && len(withPIN) > 0 && wanted == "" {
		matches = withPIN
	}
	switch {
	case len(matches) == 1:
		return matches[0], nil
	case len(matches) > 1 && wanted == "":
		return TokenInfo{}, fail(none, odd, "%s has several tokens; choose one with HSM_TOKEN or --token: %s", cfg.Module, describe(matches))
	case len(matches) > 1:
		return TokenInfo{}, fail(none, odd, "several tokens match %s: %s", wanted, describe(matches))
	case len(tokens) == 0:
		return TokenInfo{}, fail(none, odd, "%s shows no token (is the device connected and the token initialised?)", cfg.Module)
	default:
		return TokenInfo{}, fail(none, odd, "no token has %s; there is %s", wanted, describe(tokens))
	}
}

func describe(tokens []TokenInfo) string {
	var parts []string
	for _, t := range tokens {
		parts = append(parts, fmt.Sprintf("%q (serial %s, slot %d)", t.Label, t.Serial, t.Slot))
	}
	return strings.Join(parts, ", ")
}

// leave takes a pool off the token; the last one closes what is left of it.
func (t *Token) leave(ctx context.Context, p *Pool) error {
	l := t.library
	l.mu.Lock()
	last := t.members.leave(p)
	if last {
		delete(l.tokens, t)
	}
	l.mu.Unlock()
	if !last {
		t.applyLimits(p)
		return nil
	}
	t.sweeper.stop()
	if err := t.closeAll(ctx); err != nil {
		return err // the pool is told when the calls that hang come back
	}
	t.members.remove(p)
	return nil
}
