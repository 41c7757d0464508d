package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/hsmkey/hsmkey/jws"
)

// payloadFlags say what is to be signed.
type payloadFlags struct {
	claims, payload string
	expiresIn       time.Duration
	expiresGiven    bool
}

// readPayload returns what is to be signed. Whatever is wrong with it is found
// here, before the HSM is touched.
func (a *app) readPayload(f *payloadFlags) ([]byte, error) {
	switch {
	case f.claims != "" && f.payload != "":
		return nil, usagef("--claims and --payload both say what to sign")
	case f.expiresGiven && f.payload != "":
		return nil, usagef("--expires-in adds claims, and a payload has none")
	case f.expiresGiven && f.expiresIn < time.Second:
		return nil, withHint(usagef("--expires-in is %v, want a second or more", f.expiresIn), "a time looks like 90s, 15m or 1h30m")
	case f.payload != "":
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
	case f.claims == "" && a.stdinIsTerminal():
		return nil, withHint(usagef("nothing to sign: --claims or --payload is missing"), `try --claims '{"sub":"alice"}'`)
	case f.claims == "", f.claims == "-":
		return a.readInput("--claims", "-")
	}
	return []byte(f.claims), nil
}

// addTimes adds the claims iat and exp (RFC 7519 sections 4.1.6 and 4.1.4).
func addTimes(claims []byte, now time.Time, expiresIn time.Duration) ([]byte, error) {
	return addMembers(claims, times(now, expiresIn))
}

func times(now time.Time, expiresIn time.Duration) []member {
	return []member{
		{"iat", strconv.AppendInt(nil, now.Unix(), 10)},
		{"exp", strconv.AppendInt(nil, now.Add(expiresIn).Unix(), 10)},
	}
}

// member is a member of a JSON object.
type member struct {
	name  string
	value []byte
}

// addMembers adds members to the end of a JSON object, and leaves the rest of it
// as it is, to the last digit.
func addMembers(object []byte, add []member) ([]byte, error) {
	if err := hasNone(object, add); err != nil {
		return nil, err
	}
	out := append(make([]byte, 0, len(object)+128), opened(object)...)
	for i, m := range add {
		if i > 0 || out[len(out)-1] != '{' {
			out = append(out, ',')
		}
		out = append(append(append(append(out, '"'), m.name...), '"', ':'), m.value...)
	}
	return append(out, '}'), nil
}

// opened is a JSON object without its end.
func opened(object []byte) []byte {
	return bytes.TrimRight(object[:bytes.LastIndexByte(object, '}')], " \t\r\n")
}

// hasNone makes sure that a JSON object has none of the members.
func hasNone(object []byte, add []member) error {
	suspect := bytes.IndexByte(object, '\\') >= 0 // escapes may hide a name
	for _, m := range add {
		suspect = suspect || bytes.Contains(object, []byte(m.name))
	}
	if !suspect {
		return nil
	}
	var there map[string]json.RawMessage
	if err := json.Unmarshal(object, &there); err != nil {
		return fmt.Errorf("%w: %w", jws.ErrClaims, err)
	}
	for _, m := range add {
		if _, is := there[m.name]; is {
			flag := "--expires-in"
			if m.name == "jti" {
				flag = "--jti"
			}
			return withHint(fmt.Errorf("%w: they have %q already, which %s adds", jws.ErrClaims, m.name, flag), "leave out one of the two")
		}
	}
	return nil
}
