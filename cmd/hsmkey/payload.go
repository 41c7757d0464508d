package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/hsmkey/hsmkey/jws"
)

// payloadFlags say what is to be signed.
type payloadFlags struct {
	claims, payload           string
	expiresIn                 time.Duration
	claimsGiven, payloadGiven bool
	expiresGiven              bool
}

// readPayload returns what is to be signed. Whatever is wrong with it is found
// here, before the HSM is touched.
func (a *app) readPayload(f *payloadFlags) ([]byte, error) {
	switch {
	case f.claimsGiven && f.payloadGiven:
		return nil, usagef("--claims and --payload both say what to sign")
	case f.expiresGiven && f.payloadGiven:
		return nil, usagef("--expires-in adds claims, and a payload has none")
	case f.expiresGiven && f.expiresIn < time.Second:
		return nil, withHint(usagef("--expires-in is %v, want a second or more", f.expiresIn), "a time looks like 90s, 15m or 1h30m")
	case f.payloadGiven:
		return a.readInput("--payload", f.payload)
	}
	claims, err := a.readClaims(f)
	if err != nil {
		return nil, err
	}
	if claims, err = jws.MarshalClaims(json.RawMessage(claims)); err != nil {
		return nil, err
	}
	if f.expiresGiven {
		if claims, err = addTimes(claims, time.Now(), f.expiresIn); err != nil {
			return nil, err
		}
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, claims); err != nil {
		return nil, fmt.Errorf("%w: %w", jws.ErrClaims, err)
	}
	return compact.Bytes(), nil
}

func (a *app) readClaims(f *payloadFlags) ([]byte, error) {
	switch file, isFile := strings.CutPrefix(f.claims, "@"); {
	case isFile:
		return a.readInput("--claims", file)
	case !f.claimsGiven && a.stdinIsTerminal():
		return nil, withHint(usagef("nothing to sign: --claims or --payload is missing"), `try --claims '{"sub":"alice"}'`)
	case !f.claimsGiven, f.claims == "-":
		return a.readInput("--claims", "-")
	}
	return []byte(f.claims), nil
}

// addTimes adds the claims iat and exp (RFC 7519 sections 4.1.6 and 4.1.4) to a
// JSON object, and leaves the rest of it as it is, to the last digit.
func addTimes(claims []byte, now time.Time, expiresIn time.Duration) ([]byte, error) {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(claims, &members); err != nil {
		return nil, fmt.Errorf("%w: %w", jws.ErrClaims, err)
	}
	for _, name := range []string{"exp", "iat"} {
		if _, there := members[name]; there {
			return nil, withHint(fmt.Errorf("%w: they have %q already, which --expires-in adds", jws.ErrClaims, name), "leave out one of the two")
		}
	}
	open := bytes.TrimRight(claims, " \t\r\n")
	open = bytes.TrimRight(open[:len(open)-1], " \t\r\n")
	comma := ","
	if len(members) == 0 {
		comma = ""
	}
	return fmt.Appendf(bytes.Clone(open), `%s"iat":%d,"exp":%d}`, comma, now.Unix(), now.Add(expiresIn).Unix()), nil
}
