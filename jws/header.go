package jws

import (
	stdjson "encoding/json"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"

	"github.com/hsmkey/hsmkey"
)

// reservedHeaders cannot be given as extra headers: they are made from other
// options, say how the signature is to be checked, or name a key that nobody
// asked a verifier to trust. RFC 7515 section 4.1, RFC 7797 (b64), RFC 8555
// section 6.5 (nonce), RFC 7516 section 4.1 and RFC 7518 section 4 (encryption).
var reservedHeaders = map[string]bool{
	"alg": true, "kid": true, "typ": true, "cty": true,
	"jwk": true, "jku": true, "x5u": true, "x5c": true, "x5t": true, "x5t#s256": true,
	"crit": true, "b64": true, "nonce": true,
	"enc": true, "zip": true, "epk": true, "apu": true, "apv": true,
	"iv": true, "tag": true, "p2s": true, "p2c": true,
}

// joseHeaders returns what go-jose adds to the "alg" in the protected header. Its
// values are strings and finished JSON, so that go-jose has nothing to fail at,
// and what the caller changes later in a value changes no token.
func (o Options) joseHeaders(kid string) (map[jose.HeaderKey]any, error) {
	headers := make(map[jose.HeaderKey]any, len(o.Header)+3)
	for name, value := range map[jose.HeaderKey]string{
		"kid":                  kid,
		jose.HeaderType:        o.Type,
		jose.HeaderContentType: o.ContentType,
	} {
		if !utf8.ValidString(value) {
			return nil, fmt.Errorf("%w: the header %q is not valid UTF-8", hsmkey.ErrConfig, name)
		}
		if value != "" {
			headers[name] = value
		}
	}
	for name, value := range o.Header {
		raw, err := extraHeader(name, value)
		if err != nil {
			return nil, fmt.Errorf("%w: extra header %q %w", hsmkey.ErrConfig, name, err)
		}
		headers[jose.HeaderKey(name)] = raw
	}
	return headers, nil
}

// extraHeader checks one extra header and returns its value as JSON.
func extraHeader(name string, value any) (stdjson.RawMessage, error) {
	switch {
	case name == "":
		return nil, fmt.Errorf("has no name")
	case !utf8.ValidString(name):
		return nil, fmt.Errorf("has a name that is not valid UTF-8")
	case reservedHeaders[strings.ToLower(name)]:
		// In any case of letters, because some readers ignore it.
		return nil, fmt.Errorf("cannot be given: it is registered for JOSE itself")
	}
	raw, err := stdjson.Marshal(value)
	if err != nil {
		return nil, fmt.Errorf("cannot be written as JSON: %w", err)
	}
	// What readers do, and refuse: go-jose takes no duplicate names at any depth.
	var read any
	if err := json.Unmarshal(raw, &read); err != nil {
		return nil, fmt.Errorf("could not be read again: %w", err)
	}
	return raw, nil
}
