package pkcs11uri

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

const scheme = "pkcs11:"

// Error says what is wrong with a URI. It never quotes a value: the URI may
// hold a PIN.
type Error struct {
	Attribute string // standard attribute at fault, "" where there is none
	Offset    int    // byte offset into the URI, from 0
	Reason    string
}

func (e *Error) Error() string {
	if e.Attribute == "" {
		return fmt.Sprintf("PKCS#11 URI, offset %d: %s", e.Offset, e.Reason)
	}
	return fmt.Sprintf("PKCS#11 URI, attribute %s at offset %d: %s", e.Attribute, e.Offset, e.Reason)
}

// Parse reads a PKCS#11 URI. Names of attributes are case-insensitive, as the
// ABNF of RFC 7512 §2.3 makes them. The error is an *Error.
//
// pin-source is a file: an absolute path, alone or as file:/path,
// file:///path or file://localhost/path. It is percent-decoded once, like
// every other attribute. A command ("|program") is refused.
func Parse(uri string) (URI, error) { return parse(uri, nil) }

// ParseOnly is Parse where only the named standard attributes have a meaning. It
// refuses the others: ignored, they would match more than they say.
func ParseOnly(uri string, names ...string) (URI, error) { return parse(uri, names) }

func parse(uri string, only []string) (URI, error) {
	if len(uri) < len(scheme) || !strings.EqualFold(uri[:len(scheme)], scheme) {
		return URI{}, &Error{Reason: `does not begin with "pkcs11:"`}
	}
	path, query, _ := strings.Cut(uri[len(scheme):], "?")

	var u URI
	p := component{uri: &u, only: only, known: pathAttributes, elsewhere: queryAttributes,
		misplaced: `belongs in the query, after "?"`, isChar: isPathChar}
	if err := p.parse(path, len(scheme), ";"); err != nil {
		return URI{}, err
	}
	q := component{uri: &u, only: only, known: queryAttributes, elsewhere: pathAttributes,
		misplaced: `belongs in the path, before "?"`, isChar: isQueryChar, vendor: true}
	queryOffset := len(scheme) + len(path) + 1
	if err := q.parse(query, queryOffset, "&"); err != nil {
		return URI{}, err
	}
	if u.PINSource != "" && u.PINValue != "" { // §2.4
		return URI{}, &Error{"pin-source", queryOffset, "is given together with pin-value"}
	}
	return u, nil
}

// component reads the path or the query of a URI.
type component struct {
	uri       *URI
	only      []string // names of the attributes that are allowed; nil: all
	known     []attribute
	elsewhere []attribute // attributes of the other component
	misplaced string      // what to say about those
	isChar    func(byte) bool
	vendor    bool // unknown attributes are allowed

	seen []string
}

func (c *component) parse(s string, offset int, separator string) error {
	if s == "" {
		return nil
	}
	for run := range strings.SplitSeq(s, separator) {
		if err := c.attribute(run, offset); err != nil {
			return err
		}
		offset += len(run) + len(separator)
	}
	return nil
}

// attribute reads one "name=value" at offset. An unknown name is never quoted:
// it may be the rest of a PIN whose separator was not percent-encoded.
func (c *component) attribute(run string, offset int) error {
	name, raw, found := strings.Cut(run, "=")
	if !found {
		return &Error{Offset: offset, Reason: "an attribute must be name=value"}
	}
	if name == "" || strings.ContainsFunc(name, func(r rune) bool { return !isNameChar(r) }) {
		return &Error{Offset: offset, Reason: "malformed attribute name"}
	}
	name = strings.ToLower(name)
	byName := func(a attribute) bool { return a.name == name }

	if slices.ContainsFunc(c.elsewhere, byName) {
		return &Error{name, offset, c.misplaced}
	}
	valueOffset := offset + len(run) - len(raw)
	i := slices.IndexFunc(c.known, byName)
	if i < 0 {
		return c.unknown(name, raw, offset, valueOffset)
	}
	if c.only != nil && !slices.Contains(c.only, name) {
		return &Error{name, offset, "has no meaning here; allowed are " + strings.Join(c.only, ", ")}
	}
	a := c.known[i]
	if slices.Contains(c.seen, name) {
		return &Error{name, offset, "appears more than once"}
	}
	c.seen = append(c.seen, name)

	value, err := c.decode(name, raw, valueOffset)
	if err != nil {
		return err
	}
	switch {
	case value == "":
		return &Error{name, offset, "has no value; leave it out"}
	case !a.binary && !utf8.ValidString(value):
		return &Error{name, offset, "is not UTF-8"}
	case !a.binary && strings.Contains(value, "\x00"):
		return &Error{name, offset, "contains a NUL"}
	}
	if problem := a.set(c.uri, value); problem != "" {
		return &Error{name, offset, problem}
	}
	return nil
}

func (c *component) unknown(name, raw string, offset, valueOffset int) error {
	if !c.vendor || strings.HasPrefix(name, "pin-") || strings.HasPrefix(name, "module-") {
		known := make([]string, len(c.known))
		for i, a := range c.known {
			known[i] = a.name
		}
		return &Error{Offset: offset, Reason: "unknown attribute; known here: " + strings.Join(known, ", ")}
	}
	_, err := c.decode("", raw, valueOffset)
	return err
}

// decode undoes percent-encoding, and only that.
func (c *component) decode(name, raw string, offset int) (string, error) {
	value := make([]byte, 0, len(raw))
	for i := 0; i < len(raw); i++ {
		switch {
		case c.isChar(raw[i]):
			value = append(value, raw[i])
		case raw[i] != '%':
			return "", &Error{name, offset + i, "has a character that must be percent-encoded"}
		default:
			if i+2 >= len(raw) {
				return "", &Error{name, offset + i, `has a "%" without two hexadecimal digits`}
			}
			octet, err := strconv.ParseUint(raw[i+1:i+3], 16, 8)
			if err != nil {
				return "", &Error{name, offset + i, `has a "%" without two hexadecimal digits`}
			}
			value = append(value, byte(octet))
			i += 2
		}
	}
	return string(value), nil
}

func setType(u *URI, value string) string {
	u.Type = strings.ToLower(value)
	switch u.Type {
	case "public", "private", "cert", "secret-key", "data":
		return ""
	}
	return "must be public, private, cert, secret-key or data"
}

func setLibraryVersion(u *URI, value string) string {
	numbers := strings.Split(value, ".")
	if len(numbers) > 2 {
		return "must be a version, such as 2 or 2.6"
	}
	for _, number := range numbers {
		if _, ok := parseDigits(number, 8); !ok { // CK_VERSION has one byte for each
			return "must be a version, such as 2 or 2.6"
		}
	}
	u.LibraryVersion = value
	return ""
}

func setSlotID(u *URI, value string) string {
	number, ok := parseDigits(value, strconv.IntSize)
	if !ok {
		return "must be a decimal number"
	}
	id := uint(number)
	u.SlotID = &id
	return ""
}

func setModulePath(u *URI, value string) string {
	if !filepath.IsAbs(value) { // §2.4: a relative path should be refused
		return "must be an absolute path"
	}
	u.ModulePath = value
	return ""
}

func setPINSource(u *URI, value string) string {
	if strings.HasPrefix(value, "|") {
		return "names a command; only files are supported"
	}
	path := value
	if rest, isURI := cutPrefixFold(value, "file:"); isURI {
		path = rest
		if authority, hasAuthority := strings.CutPrefix(rest, "//"); hasAuthority {
			host, _, _ := strings.Cut(authority, "/")
			if host != "" && !strings.EqualFold(host, "localhost") {
				return "names a file on another host"
			}
			path = authority[len(host):]
		}
	}
	if !filepath.IsAbs(path) {
		return "must be an absolute path or a file: URI with one"
	}
	u.PINSource = path
	return ""
}

func cutPrefixFold(s, prefix string) (string, bool) {
	if len(s) < len(prefix) || !strings.EqualFold(s[:len(prefix)], prefix) {
		return s, false
	}
	return s[len(prefix):], true
}

func parseDigits(s string, bits int) (uint64, bool) {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return 0, false
		}
	}
	number, err := strconv.ParseUint(s, 10, bits)
	return number, err == nil
}

// Character classes of RFC 7512 §2.3 and §2.4, without pct-encoded.

func isNameChar(r rune) bool {
	return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || r == '-' || r == '_'
}

func isAvailable(c byte) bool {
	return isNameChar(rune(c)) || strings.IndexByte(".~:[]@!$'()*+,=", c) >= 0
}

func isPathChar(c byte) bool { return isAvailable(c) || c == '&' }

func isQueryChar(c byte) bool { return isAvailable(c) || c == '/' || c == '?' || c == '|' }
