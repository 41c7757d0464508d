package main

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"strings"
	"time"

	"github.com/hsmkey/hsmkey/internal/batchfile"
	"github.com/hsmkey/hsmkey/jws"
)

// claimsMaker makes the payload of a token from a line.
type claimsMaker struct {
	expiresIn time.Duration
	uniqueID  bool
}

// fixed reports whether the same line always makes the same payload.
func (c *claimsMaker) fixed() bool { return c.expiresIn == 0 && !c.uniqueID }

// make checks the claims of a line and adds what was asked for. The rest stays
// as it is, to the last digit and blank.
func (c *claimsMaker) make(text []byte) ([]byte, error) {
	claims, err := jws.MarshalClaims(json.RawMessage(bytes.TrimSpace(text)))
	if err != nil {
		return nil, err
	}
	if c.fixed() {
		return claims, nil
	}
	var add []member
	if c.expiresIn > 0 {
		now := time.Now()
		add = append(add, member{"iat", fmt.Append(nil, now.Unix())}, member{"exp", fmt.Append(nil, now.Add(c.expiresIn).Unix())})
	}
	if c.uniqueID {
		add = append(add, member{"jti", fmt.Appendf(nil, "%q", newID())})
	}
	return addMembers(claims, add)
}

// newID is 128 random bits.
func newID() string {
	var id [16]byte
	rand.Read(id[:]) //nolint:errcheck // never fails: it ends the process instead
	return base64.RawURLEncoding.EncodeToString(id[:])
}

// lineFeed turns lines into the items of a batch: eight bytes with the number of
// the line, and its text; nothing but the number stands for a line that is too
// long.
type lineFeed struct {
	claims *claimsMaker
	signer *jws.Signer
	skip   bool
	done   int    // tokens that an earlier run wrote
	last   string // the last of them
	err    error  // why the input ended early
}

const numberSize = 8

// all yields the lines that are still to be signed.
func (f *lineFeed) all(input io.Reader) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		var item []byte
		done := 0
		for line := range batchfile.Lines(input, func(err error) { f.err = fmt.Errorf("reading the input: %w", err) }) {
			if done < f.done {
				// An earlier run has signed this line, or passed it over.
				payload, err := f.payload(line.Text)
				switch {
				case err == nil:
					done++
					if done == f.done {
						if f.err = f.agree(line.Number, payload); f.err != nil {
							return
						}
					}
				case !f.skip:
					f.err = lineError(line.Number, err)
					return
				}
				continue
			}
			item = binary.BigEndian.AppendUint64(item[:0], uint64(line.Number))
			if !yield(append(item, line.Text...)) {
				return
			}
		}
		if f.err == nil && done < f.done {
			f.err = withHint(usagef("the output has %d tokens, the input only %d lines of claims", f.done, done), "--resume goes on with the same --in and --out")
		}
	}
}

func (f *lineFeed) payload(text []byte) ([]byte, error) {
	if len(text) == 0 {
		return nil, batchfile.ErrTooLong
	}
	return f.claims.make(text)
}

// prepare is the payload of an item.
func (f *lineFeed) prepare(_ int, item []byte) ([]byte, error) {
	payload, err := f.payload(item[numberSize:])
	if err != nil {
		return nil, lineError(int(binary.BigEndian.Uint64(item)), err) //nolint:gosec // it was an int
	}
	return payload, nil
}

func lineError(number int, err error) error { return fmt.Errorf("line %d: %w", number, err) }

// agree makes sure that the last token of an earlier run is that of this line,
// key and options.
func (f *lineFeed) agree(number int, payload []byte) error {
	changed := func(what string) error {
		return withHint(usagef("--resume: the last token of the output does not have the %s of line %d", what, number),
			"go on with the same --in, --key and options, or begin anew without --resume")
	}
	header, rest, _ := strings.Cut(f.last, ".")
	encoded, _, whole := strings.Cut(rest, ".")
	if !whole || header != f.signer.EncodedHeader() {
		return changed("header that belongs to the key and options, and so not the token")
	}
	got, err := base64.RawURLEncoding.DecodeString(encoded)
	switch {
	case err != nil:
		return changed("claims")
	case f.claims.fixed() && !bytes.Equal(got, payload):
		return changed("claims")
	case !f.claims.fixed() && !sameStart(got, payload):
		return changed("claims")
	}
	return nil
}

// sameStart reports whether two payloads are one but for what was added to them,
// which stands at their end.
func sameStart(a, b []byte) bool {
	cut := func(p []byte) []byte {
		for _, added := range []string{`"iat":`, `"jti":`} {
			if at := bytes.LastIndex(p, []byte(added)); at >= 0 {
				return p[:at]
			}
		}
		return p
	}
	return bytes.Equal(cut(a), cut(b))
}
