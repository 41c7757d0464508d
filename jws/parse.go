package jws

import (
	"encoding/base64"
	stdjson "encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"

	"github.com/hsmkey/hsmkey"
)

// Header is the protected header of a token.
type Header struct {
	Algorithm   hsmkey.Algorithm // alg
	KeyID       string           // kid
	Type        string           // typ
	ContentType string           // cty

	// Raw is the whole header, the JSON object that was signed.
	Raw stdjson.RawMessage
}

// signature is one signature of a token that is not verified yet.
type signature struct {
	header Header
	object *jose.JSONWebSignature
	input  string // what was signed
	value  []byte
}

// parse reads a token in any of the three forms. It checks the form, refuses what
// this package does not process, and answers with errors that match ErrMalformed.
//
// Only the protected header counts: it is what the signature covers. JSON forms
// are taken apart into compact ones, so that there is one way from here on.
func parse(token string) ([]signature, error) {
	var (
		compact []string
		err     error
	)
	if strings.HasPrefix(token, "{") {
		compact, err = splitJSON(token)
	} else {
		compact = []string{token}
	}
	if err != nil {
		return nil, malformed("%w", err)
	}
	signatures := make([]signature, len(compact))
	for i, c := range compact {
		if signatures[i], err = parseCompact(c); err != nil {
			return nil, malformed("%w", err)
		}
	}
	return signatures, nil
}

// splitJSON returns a compact form for each signature of a token in one of the
// JSON forms (RFC 7515, section 7.2).
func splitJSON(token string) ([]string, error) {
	type entry struct {
		Protected *string                       `json:"protected"`
		Header    map[string]stdjson.RawMessage `json:"header"`
		Signature *string                       `json:"signature"`
	}
	var object struct {
		Payload    *string  `json:"payload"`
		Signatures *[]entry `json:"signatures"`
		entry
	}
	if err := json.Unmarshal([]byte(token), &object); err != nil {
		return nil, fmt.Errorf("it cannot be read: %w", err)
	}
	entries := []entry{object.entry}
	if object.Signatures != nil {
		if object.Protected != nil || object.Header != nil || object.Signature != nil {
			return nil, errors.New(`it has "signatures" and, beside it, members of the flattened form`)
		}
		entries = *object.Signatures
	}
	switch {
	case object.Payload == nil:
		return nil, errors.New(`it has no "payload"`)
	case len(entries) == 0 || len(entries) > jose.MaxSignatures:
		return nil, fmt.Errorf("it has %d signatures, 1 to %d are read", len(entries), jose.MaxSignatures)
	}
	compact := make([]string, len(entries))
	for i, e := range entries {
		if e.Protected == nil || e.Signature == nil {
			return nil, errors.New(`a signature without "protected" or "signature"`)
		}
		if _, found := e.Header["crit"]; found {
			return nil, errors.New(`"crit" stands in the unprotected header`)
		}
		compact[i] = *e.Protected + "." + *object.Payload + "." + *e.Signature
	}
	return compact, nil
}

func parseCompact(token string) (signature, error) {
	var sig signature
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return sig, fmt.Errorf("%d parts between dots, a token has 3", len(parts))
	}
	// go-jose forgives line breaks and stray bits. We don't: one token, one form.
	decoded := make([][]byte, len(parts))
	for i, name := range []string{"header", "payload", "signature"} {
		var err error
		if decoded[i], err = decode(parts[i]); err != nil {
			return sig, fmt.Errorf("the %s is not base64url: %w", name, err)
		}
	}
	sig.input = token[:len(parts[0])+len(".")+len(parts[1])]
	sig.value = decoded[2]
	if err := sig.header.read(decoded[0]); err != nil {
		return sig, fmt.Errorf("the header %w", err)
	}
	var err error
	alg := jose.SignatureAlgorithm(sig.header.Algorithm)
	if sig.object, err = jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{alg}); err != nil {
		return sig, err
	}
	return sig, nil
}

// decode is strict about base64url without padding (RFC 7515, section 2).
func decode(part string) ([]byte, error) {
	if strings.ContainsAny(part, "\r\n") {
		return nil, errors.New("it contains a line break")
	}
	return base64.RawURLEncoding.Strict().DecodeString(part)
}

// read takes a protected header apart (RFC 7515, section 4).
func (h *Header) read(raw []byte) error {
	var members map[string]stdjson.RawMessage
	if err := json.Unmarshal(raw, &members); err != nil {
		return fmt.Errorf("cannot be read: %w", err)
	}
	for _, name := range []string{"crit", "b64"} {
		// Section 4.1.11: what is critical and not understood must be refused.
		if _, found := members[name]; found {
			return fmt.Errorf("has the member %q, which is not supported", name)
		}
	}
	var alg string
	for name, field := range map[string]*string{"alg": &alg, "kid": &h.KeyID, "typ": &h.Type, "cty": &h.ContentType} {
		value, found := members[name]
		if !found {
			continue
		}
		if string(value) == "null" {
			return fmt.Errorf("has a %q that is null", name)
		}
		if err := stdjson.Unmarshal(value, field); err != nil {
			return fmt.Errorf("has a %q that is no string", name)
		}
	}
	if alg == "" {
		return errors.New(`has no "alg"`)
	}
	h.Algorithm = hsmkey.Algorithm(alg)
	h.Raw = raw
	return nil
}
