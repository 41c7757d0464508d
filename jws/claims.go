package jws

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"unicode/utf8"
)

// ErrClaims means that the claims are not one JSON object in UTF-8, or name a
// claim twice.
var ErrClaims = errors.New("invalid claims")

// SignClaims returns a JWT (RFC 7519) in compact form. What may be claims, and
// when they are refused with [ErrClaims], is described at [MarshalClaims].
func (s *Signer) SignClaims(ctx context.Context, claims any) (string, error) {
	payload, err := MarshalClaims(claims)
	if err != nil {
		return "", err
	}
	return s.Sign(ctx, payload)
}

// MarshalClaims returns claims as the payload of a JWT. They may be
//
//   - any value that encoding/json writes as an object: a struct, a map,
//     go-jose's jwt.Claims;
//   - a [json.RawMessage] or []byte that holds one JSON object already. It is
//     signed as it is, byte for byte.
//
// Anything else is [ErrClaims], and so is JSON that is not UTF-8 or names one
// claim twice: of those RFC 7519 section 4 lets a reader take the last one or
// refuse all. Within the value of a claim duplicates are the caller's business.
func MarshalClaims(claims any) ([]byte, error) {
	var payload []byte
	switch claims := claims.(type) {
	case json.RawMessage:
		payload = claims
	case []byte:
		payload = claims
	default:
		var err error
		if payload, err = json.Marshal(claims); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrClaims, err)
		}
	}
	if err := checkClaims(payload); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrClaims, err)
	}
	return payload, nil
}

// checkClaims tells in which way, if any, payload is not one JSON object with
// each name once.
func checkClaims(payload []byte) error {
	if !json.Valid(payload) {
		return notJSON(payload)
	}
	if !utf8.Valid(payload) {
		return errors.New("the JSON is not valid UTF-8")
	}
	if kind := jsonKind(payload); kind != "object" {
		return fmt.Errorf("a JSON object is needed, this is a JSON %s", kind)
	}
	if name, found := duplicateMember(payload); found {
		return fmt.Errorf("the claim %.64q is there twice", name)
	}
	return nil
}

// notJSON explains what is wrong with something that is not JSON.
func notJSON(payload []byte) error {
	if len(bytes.TrimSpace(payload)) == 0 {
		return errors.New("a JSON object is needed, this is empty")
	}
	if bytes.HasPrefix(payload, []byte("\uFEFF")) {
		return errors.New("not JSON: it begins with a byte order mark")
	}
	var value any
	err := json.Unmarshal(payload, &value)
	if syntax := (*json.SyntaxError)(nil); errors.As(err, &syntax) {
		return fmt.Errorf("not JSON: %w at byte %d", err, syntax.Offset)
	}
	return fmt.Errorf("not JSON: %w", err)
}

// jsonKind names the type of a JSON text, which is valid.
func jsonKind(text []byte) string {
	switch c := bytes.TrimLeft(text, " \t\r\n")[0]; c {
	case '{':
		return "object"
	case '[':
		return "array"
	case '"':
		return "string"
	case 't', 'f':
		return "boolean"
	case 'n':
		return "null"
	default:
		return "number"
	}
}

// duplicateMember returns a name that the object has twice. The object is valid
// JSON; the objects within it are not looked at.
func duplicateMember(object []byte) (string, bool) {
	var (
		few   [16][]byte // most claims sets fit
		names = few[:0]
		many  map[string]bool // takes over where few is full
		depth int
		isKey bool // the next string is a name of the outermost object
	)
	for i := 0; i < len(object); i++ {
		switch object[i] {
		case '{', '[':
			depth++
			isKey = depth == 1
		case '}', ']':
			depth--
		case ',':
			isKey = depth == 1
		case '"':
			start := i
			i = stringEnd(object, start)
			if !isKey {
				continue
			}
			isKey = false
			name := memberName(object[start : i+1])
			equal := func(other []byte) bool { return bytes.Equal(name, other) }
			if many[string(name)] || slices.ContainsFunc(names, equal) {
				return string(name), true
			}
			if len(names) < cap(names) {
				names = append(names, name)
				continue
			}
			if many == nil {
				many = make(map[string]bool)
			}
			many[string(name)] = true
		}
	}
	return "", false
}

// stringEnd returns the index of the quote that ends the string that begins at
// start.
func stringEnd(text []byte, start int) int {
	for i := start + 1; ; i++ {
		switch text[i] {
		case '\\':
			i++
		case '"':
			return i
		}
	}
}

// memberName returns the name that a quoted string stands for.
func memberName(quoted []byte) []byte {
	if bytes.IndexByte(quoted, '\\') < 0 {
		return quoted[1 : len(quoted)-1]
	}
	var name string
	// It cannot fail: the text is valid JSON.
	_ = json.Unmarshal(quoted, &name)
	return []byte(name)
}
