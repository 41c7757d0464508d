package jws

import (
	"context"
	"encoding/base64"
	"fmt"

	"github.com/hsmkey/hsmkey"
)

// Format is a way to write a token down (RFC 7515, section 7).
type Format int

// The formats.
const (
	Compact   Format = iota // header.payload.signature; the only one for JWTs
	Flattened               // a JSON object with one signature
	General                 // a JSON object with a list of signatures, here of one
)

// String returns the name that [ParseFormat] reads.
func (f Format) String() string {
	switch f {
	case Compact:
		return "compact"
	case Flattened:
		return "flattened"
	case General:
		return "json"
	}
	return fmt.Sprintf("Format(%d)", int(f))
}

// ParseFormat reads "compact", "flattened" or "json" (general); anything else is
// [hsmkey.ErrConfig].
func ParseFormat(name string) (Format, error) {
	for _, f := range []Format{Compact, Flattened, General} {
		if name == f.String() {
			return f, nil
		}
	}
	return 0, fmt.Errorf("%w: unknown format %q, want compact, json or flattened", hsmkey.ErrConfig, name)
}

// Sign returns the payload, which may be anything and may be empty, as a signed
// token in compact form. The errors are those of [hsmkey.HSMJWK.SignJWS]; a
// failed session is replaced, and the signature repeated, before one is returned.
func (s *Signer) Sign(ctx context.Context, payload []byte) (string, error) {
	input := s.signingInput(payload)
	sig, err := s.sign(ctx, input)
	if err != nil {
		return "", err
	}
	token := append(input, '.') // in the room that signingInput left
	return string(base64.RawURLEncoding.AppendEncode(token, sig)), nil
}

// SignFormat is [Signer.Sign] with a choice of format. An unknown one is
// [hsmkey.ErrConfig].
func (s *Signer) SignFormat(ctx context.Context, payload []byte, format Format) (string, error) {
	switch format {
	case Compact:
		return s.Sign(ctx, payload)
	case Flattened, General:
		return s.signJSON(ctx, payload, format)
	}
	return "", fmt.Errorf("%w: unknown format %v", hsmkey.ErrConfig, format)
}

// signJSON writes the JSON forms (RFC 7515, section 7.2). All their values are
// base64url, which needs no escapes.
func (s *Signer) signJSON(ctx context.Context, payload []byte, format Format) (string, error) {
	input := s.signingInput(payload)
	sig, err := s.sign(ctx, input)
	if err != nil {
		return "", err
	}
	protected, encoded := input[:len(s.prefix)-1], input[len(s.prefix):]
	signature := fmt.Sprintf(`"protected":"%s","signature":"%s"`, protected, base64.RawURLEncoding.EncodeToString(sig))
	if format == General {
		signature = fmt.Sprintf(`"signatures":[{%s}]`, signature)
	}
	return fmt.Sprintf(`{"payload":"%s",%s}`, encoded, signature), nil
}

// signingInput returns what is signed (RFC 7515, section 5.1), with room behind
// it for the rest of a compact token.
func (s *Signer) signingInput(payload []byte) []byte {
	enc := base64.RawURLEncoding
	input := make([]byte, 0, len(s.prefix)+enc.EncodedLen(len(payload))+len(".")+enc.EncodedLen(s.size))
	return enc.AppendEncode(append(input, s.prefix...), payload)
}
