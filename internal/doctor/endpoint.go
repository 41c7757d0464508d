package doctor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/balance"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// examineMember examines an endpoint of a balance list.
func (x *examination) examineMember(ctx context.Context, e *Endpoint, m balance.Member) {
	listed := m.Endpoint()
	found := (*checks)(&e.Checks)
	if e.Transport == Plaintext && !isLoopback(listed.Host) {
		found.warn("transport", "encrypt it: HSM_TLS_CA, HSM_TLS_CERT and HSM_TLS_KEY", "PINs travel in the clear (HSM_REMOTE_PLAINTEXT=1)")
	}
	switch {
	case listed.PINValue() != "":
		found.checkPINSource(PINOrigin{Words: "pin-value in the list", File: m.List})
	case listed.PINSource != "":
		found.checkPINSource(PINOrigin{Words: "pin-source", File: listed.PINSource})
	}
	x.examine(ctx, e, m)
}

// isLoopback reports whether an address is certainly one of this machine.
func isLoopback(host string) bool { return host == "localhost" || net.ParseIP(host).IsLoopback() }

// examine looks at a token and at the keys on it.
func (x *examination) examine(ctx context.Context, e *Endpoint, source sessionpool.Source) {
	found := (*checks)(&e.Checks)
	token, err := describe(ctx, source)
	if err != nil {
		found.unusable("connection", e, err)
		return
	}
	e.Name = cmp.Or(e.Name, token.on.Name())
	e.Library = token.library
	e.Token, e.Serial, e.TokenLimit = token.info.Label, token.info.Serial, token.info.MaxSessions
	e.RoundTrip = Milliseconds(token.roundTrip)
	found.ok("token", "%q, serial %s, %s by %s, in slot %d", token.info.Label, token.info.Serial, token.info.Model, token.info.Manufacturer, token.info.Slot)
	loggedIn := checkPINState(found, token.flags) && x.logIn(ctx, e, source)
	checkAlgorithms(found, e, token.on)
	x.checkSessions(found, e, token.on)
	found.ok("round trip", "%s", e.RoundTrip)
	switch {
	case !loggedIn:
	case x.keyWanted():
		x.checkKey(ctx, e, source)
	default:
		x.listKeys(ctx, e, source)
	}
}

// unusable is the failure of getting a session.
func (c *checks) unusable(name string, e *Endpoint, err error) {
	if errors.Is(err, hsmkey.ErrPIN) {
		c.fail("login", err, "the PIN is taken from --pin-file, HSM_PIN_FILE, HSM_PIN, a URI or a prompt; a wrong one is sent once")
		return
	}
	c.fail(name, unreachable(e, err), connectionHint(e.Transport, err))
}

// unreachable makes sure that an HSM at an address which does not answer counts
// as down, not as a mistake in the configuration.
func unreachable(e *Endpoint, err error) error {
	if e.Transport == InProcess || errors.Is(err, hsmkey.ErrSession) || errors.Is(err, hsmkey.ErrTimeout) {
		return err
	}
	return failure(hsmkey.ErrSession, err, "no session")
}

func connectionHint(t Transport, err error) string {
	switch {
	case errors.Is(err, hsmkey.ErrTimeout):
		return "is the HSM up? --timeout gives it longer"
	case t == TLS || t == Plaintext:
		return "does `p11-kit remote` serve there, as in docs/load-balancing.md?"
	case t == Vendor:
		return "does the library reach its HSM? HSM_REMOTE_ENV tells it the address"
	}
	return "is the library installed, and the token there?"
}

// description is what a token tells without a login.
type description struct {
	on        *sessionpool.Token
	info      sessionpool.TokenInfo
	flags     uint // fresh ones
	library   string
	roundTrip time.Duration
}

// roundTrips is how many calls are measured, of which the median counts, and
// roundTripTime bounds how long that may take.
const (
	roundTrips    = 9
	roundTripTime = time.Second
)

// describe asks a token what it tells everybody. The round trip is that of
// C_GetTokenInfo: its state is known to the HSM alone.
func describe(ctx context.Context, source sessionpool.Source) (*description, error) {
	s, err := source.Acquire(ctx, sessionpool.Public())
	if err != nil {
		return nil, err
	}
	defer s.Release()
	d := &description{on: s.Token(), info: s.Token().Info()}
	err = s.Do(ctx, func(m sessionpool.Module, _ pkcs11.SessionHandle) error {
		library, err := m.GetInfo()
		if err != nil {
			return err
		}
		d.library = fmt.Sprintf("%s %d.%d", strings.TrimRight(library.LibraryDescription, " \x00"), library.LibraryVersion.Major, library.LibraryVersion.Minor)
		d.roundTrip, err = median(roundTrips, roundTripTime, func() error {
			token, err := m.GetTokenInfo(d.info.Slot)
			d.flags = token.Flags
			return err
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	return d, nil
}

// median measures a call some times, but not for longer than most.
func median(times int, most time.Duration, call func() error) (time.Duration, error) {
	var took []time.Duration
	for begin := time.Now(); len(took) < times && (len(took) == 0 || time.Since(begin) < most); {
		start := time.Now()
		if err := call(); err != nil {
			return 0, err
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	return took[len(took)/2], nil
}

// checkPINState reports whether a PIN may be sent.
func checkPINState(found *checks, flags uint) bool {
	const name = "PIN state"
	has := func(flag uint) bool { return flags&flag != 0 }
	switch {
	case !has(pkcs11.CKF_LOGIN_REQUIRED):
		return true
	case !has(pkcs11.CKF_USER_PIN_INITIALIZED):
		found.fail(name, failure(hsmkey.ErrPIN, nil, "the token has no user PIN yet"), "set one as its security officer, with the vendor's tool")
	case has(pkcs11.CKF_USER_PIN_LOCKED):
		found.fail(name, failure(hsmkey.ErrPIN, nil, "the user PIN is locked"), "the security officer has to set a new one")
	case has(pkcs11.CKF_USER_PIN_FINAL_TRY):
		found.fail(name, failure(hsmkey.ErrPIN, nil, "one try is left before the token locks, and it is left to a person"), "log in once with the vendor's tool, then run this again")
	case has(pkcs11.CKF_USER_PIN_COUNT_LOW):
		found.warn(name, "make sure that the PIN is right, before the token locks", "a wrong PIN was sent since the last login")
		return true
	case has(pkcs11.CKF_USER_PIN_TO_BE_CHANGED):
		found.warn(name, "change it with the vendor's tool", "the token wants a new PIN")
		return true
	default:
		found.ok(name, "set, and no wrong one was sent since the last login")
		return true
	}
	return false
}

// logIn logs in, once, and reports whether that worked.
func (x *examination) logIn(ctx context.Context, e *Endpoint, source sessionpool.Source) bool {
	const name = "login"
	found := (*checks)(&e.Checks)
	s, err := source.Acquire(ctx)
	if err != nil {
		found.unusable(name, e, err)
		return false
	}
	defer s.Release()
	stats := s.Token().Stats()
	switch {
	case s.Token().Info().Flags&pkcs11.CKF_LOGIN_REQUIRED == 0:
		e.Login = NotNeeded
		found.ok(name, "the token needs none")
	case !stats.LoggedIn:
		e.Login = NoPIN
		found.warn(name, "set HSM_PIN_FILE or HSM_PIN", "no PIN is configured: private keys do not show")
	case !stats.PINVerified:
		e.Login = Unverified
		found.warn(name, "run this again when nobody else in the process is logged in", "somebody else is logged in already; whether the PIN is right nobody knows")
	default:
		e.Login = Verified
		found.ok(name, "the token accepted the PIN")
	}
	return true
}

func checkAlgorithms(found *checks, e *Endpoint, token *sessionpool.Token) {
	e.Algorithms = hsmkey.TokenAlgorithms(token)
	if len(e.Algorithms) == 0 {
		found.fail("mechanisms", failure(hsmkey.ErrUnsupported, nil, "the token lists no mechanism that signs tokens"), "is it the right token?")
		return
	}
	found.ok("mechanisms", "%s", Compact(e.Algorithms))
}

// Compact names a family of algorithms that is complete by its letters.
func Compact(algorithms []hsmkey.Algorithm) string {
	var words []string
	for _, family := range []string{"RS", "PS", "ES", "EdDSA", "HS"} {
		var members []string
		for _, a := range algorithms {
			if strings.HasPrefix(string(a), family) {
				members = append(members, string(a))
			}
		}
		if len(members) == 3 {
			members = []string{family + "256/384/512"}
		}
		words = append(words, members...)
	}
	return strings.Join(words, " ")
}

func (x *examination) checkSessions(found *checks, e *Endpoint, token *sessionpool.Token) {
	e.Sessions = token.Stats().Limit
	if e.Transport == TLS || e.Transport == Plaintext {
		// Each has a connection of its own, and with it a library of its own.
		e.Sessions = cmp.Or(x.Config.Pool.MaxSessions, sessionpool.DefaultMaxSessions)
	}
	allows := "the token names no limit"
	if e.TokenLimit > 0 {
		allows = fmt.Sprintf("the token allows %d", e.TokenLimit)
	}
	if e.Sessions == 1 {
		found.warn("session limit", "signatures wait for each other; does something else use the token's sessions?", "1 at a time; %s", allows)
		return
	}
	found.ok("session limit", "%d at a time; %s", e.Sessions, allows)
}
