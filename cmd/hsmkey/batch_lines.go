package main

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"github.com/hsmkey/hsmkey/jws"
)

// claimsMaker makes the payload of a token from a line.
type claimsMaker struct {
	expiresIn time.Duration // zero: no times are added
	uniqueID  bool
}

// make checks the claims of a line and adds what was asked for. The rest stays
// as it is, to the last digit and blank.
func (c *claimsMaker) make(text []byte) ([]byte, error) {
	claims, err := jws.MarshalClaims(json.RawMessage(bytes.TrimSpace(text)))
	if err != nil {
		return nil, err
	}
	if add := c.additions(time.Now(), newID); len(add) > 0 {
		return addMembers(claims, add)
	}
	return claims, nil
}

// additions are the members that are added to claims.
func (c *claimsMaker) additions(now time.Time, id func() []byte) []member {
	var add []member
	if c.expiresIn > 0 {
		add = append(add, times(now, c.expiresIn)...)
	}
	if c.uniqueID {
		add = append(add, member{"jti", id()})
	}
	return add
}

// newID is 128 random bits as a JSON string.
func newID() []byte {
	var id [16]byte
	rand.Read(id[:]) //nolint:errcheck // never fails: it ends the process instead
	return append(base64.RawURLEncoding.AppendEncode([]byte{'"'}, id[:]), '"')
}

// made reports whether a payload is what make once made of a line: the claims, and
// behind them what was asked for, with the time and the id of then.
func (c *claimsMaker) made(payload, text []byte) bool {
	claims, err := jws.MarshalClaims(json.RawMessage(bytes.TrimSpace(text)))
	if err != nil {
		return false
	}
	var then int64
	if c.expiresIn > 0 {
		_, after, _ := bytes.Cut(lastFrom(payload, `"iat":`), []byte(":"))
		digits, _, _ := bytes.Cut(after, []byte(","))
		if then, err = strconv.ParseInt(string(digits), 10, 64); err != nil {
			return false
		}
	}
	id := func() []byte {
		_, value, _ := bytes.Cut(lastFrom(payload, `"jti":`), []byte(":"))
		return bytes.TrimSuffix(value, []byte("}"))
	}
	want := claims
	if add := c.additions(time.Unix(then, 0), id); len(add) > 0 {
		if want, err = addMembers(claims, add); err != nil {
			return false
		}
	}
	return bytes.Equal(payload, want)
}

// lastFrom is the text from the last place of a mark on.
func lastFrom(text []byte, mark string) []byte {
	return text[max(bytes.LastIndex(text, []byte(mark)), 0):]
}

func lineError(number int, err error) error { return fmt.Errorf("line %d: %w", number, err) }
