package balance

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/hsmkey/hsmkey/internal/pkcs11uri"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// Limits of balance lists.
const (
	MaxLists     = 16
	MaxEndpoints = 16       // of one list
	MaxListSize  = 64 << 10 // bytes of one file
)

// List is the content of one balance list.
type List struct {
	Path      string
	Endpoints []Endpoint // 1 to MaxEndpoints, in the order of the file
}

// Lists are the balance lists of a process in their order: the first one is
// active, each of the others takes over when the one before it fails.
type Lists []List

// Equal reports whether both have the same lists with the same endpoints in the
// same order. Comments and blanks make no difference, a changed PIN does.
func (l Lists) Equal(other Lists) bool {
	return slices.EqualFunc(l, other, func(a, b List) bool {
		return a.Path == b.Path && slices.EqualFunc(a.Endpoints, b.Endpoints, Endpoint.Equal)
	})
}

// ListError says what is wrong with a balance list and where. It matches
// [sessionpool.ErrConfig] and, if the file could not be read, the reason for that
// ([fs.ErrNotExist], [fs.ErrPermission] and so on). It never quotes a PIN.
type ListError struct {
	File   string
	Line   int // from 1; 0 when it is not about a line
	Column int // in bytes, from 1
	Reason string

	cause error
}

func (e *ListError) Error() string {
	if e.Line == 0 {
		return fmt.Sprintf("balance list %s: %s", e.File, e.Reason)
	}
	return fmt.Sprintf("balance list %s, line %d, column %d: %s", e.File, e.Line, e.Column, e.Reason)
}

// Unwrap makes errors.Is find sessionpool.ErrConfig and the error of the system.
func (e *ListError) Unwrap() []error {
	if e.cause == nil {
		return []error{sessionpool.ErrConfig}
	}
	return []error{sessionpool.ErrConfig, e.cause}
}

// LoadLists reads the 1 to MaxLists files whose paths are separated by
// [filepath.ListSeparator]. One bad list fails all. What is not a regular file is
// refused without being read or waited for.
//
// The error matches [sessionpool.ErrConfig]; about a file it is a *ListError.
func LoadLists(paths string) (Lists, error) {
	names := filepath.SplitList(paths)
	if len(names) == 0 || len(names) > MaxLists {
		return nil, fmt.Errorf("%w: %d balance lists, want 1 to %d (HSM_LOAD_BALANCE_LIST)", sessionpool.ErrConfig, len(names), MaxLists)
	}
	lists := make(Lists, 0, len(names))
	for i, name := range names {
		if name == "" {
			return nil, fmt.Errorf("%w: the path of balance list %d is empty (HSM_LOAD_BALANCE_LIST)", sessionpool.ErrConfig, i+1)
		}
		list, err := loadList(name)
		if err != nil {
			return nil, err
		}
		lists = append(lists, list)
	}
	return lists, nil
}

func loadList(path string) (List, error) {
	bad := func(reason string, cause error) (List, error) {
		return List{}, &ListError{File: path, Reason: reason, cause: cause}
	}
	// Opening a FIFO would wait for somebody to write to it.
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return bad(reasonOf(err), err)
	}
	defer file.Close() //nolint:errcheck // it was only read
	info, err := file.Stat()
	if err != nil {
		return bad(reasonOf(err), err)
	}
	if !info.Mode().IsRegular() {
		return bad("is not a regular file", nil)
	}
	endpoints, err := ParseList(path, file)
	return List{path, endpoints}, err
}

// reasonOf is an error of the system without the path, which ListError has.
func reasonOf(err error) string {
	if pathErr := (*os.PathError)(nil); errors.As(err, &pathErr) {
		err = pathErr.Err
	}
	return "cannot be read: " + err.Error()
}

// ParseList reads one balance list; name stands for it in errors, which are
// *ListError and match [sessionpool.ErrConfig].
//
// A list is ASCII text of at most MaxListSize bytes. Each line holds one
// endpoint, "<address> <port>" or a PKCS#11 URI, or nothing. A "#" at the
// beginning of a line or after a blank starts a comment. The address is an IPv4
// address, an IPv6 address with or without brackets, or a DNS name. The URI
// (RFC 7512) must have module-path, and token, serial or slot-id, and may have
// pin-source or pin-value. An endpoint must not appear twice.
func ParseList(name string, data io.Reader) ([]Endpoint, error) {
	content, err := io.ReadAll(io.LimitReader(data, MaxListSize+1))
	if err != nil {
		return nil, &ListError{File: name, Reason: reasonOf(err), cause: err}
	}
	if len(content) > MaxListSize {
		return nil, &ListError{File: name, Reason: fmt.Sprintf("has more than %d bytes", MaxListSize)}
	}
	var endpoints []Endpoint
	seen := make(map[string]int) // line of each endpoint
	number := 0
	for line := range strings.Lines(string(content)) {
		number++
		bad := func(column int, reason string) ([]Endpoint, error) {
			return nil, &ListError{File: name, Line: number, Column: column, Reason: reason}
		}
		line = strings.TrimSuffix(strings.TrimSuffix(line, "\n"), "\r")
		if column, reason := checkCharacters(line); reason != "" {
			return bad(column, reason)
		}
		words := split(line)
		if len(words) == 0 {
			continue
		}
		endpoint, column, reason := parseEndpoint(words)
		if reason != "" {
			return bad(column, reason)
		}
		if len(endpoints) == MaxEndpoints {
			return bad(words[0].column, fmt.Sprintf("more than %d endpoints", MaxEndpoints))
		}
		if earlier, ok := seen[endpoint.identity()]; ok {
			return bad(words[0].column, fmt.Sprintf("the same endpoint as in line %d", earlier))
		}
		seen[endpoint.identity()] = number
		endpoint.line, endpoint.column = number, words[0].column
		endpoints = append(endpoints, endpoint)
	}
	if len(endpoints) == 0 {
		return nil, &ListError{File: name, Reason: "has no endpoint"}
	}
	return endpoints, nil
}

// The functions below return what is wrong as a column and a reason, "" for
// nothing.

func checkCharacters(line string) (column int, reason string) {
	for i := range len(line) {
		switch c := line[i]; {
		case c >= 0x80:
			return i + 1, "not ASCII (is there a byte order mark?)"
		case c < ' ' && c != '\t' || c == 0x7f:
			return i + 1, fmt.Sprintf("control character 0x%02x", c)
		}
	}
	return 0, ""
}

// word is a piece of a line without blanks.
type word struct {
	text   string
	column int
}

func isBlank(c byte) bool { return c == ' ' || c == '\t' }

// split takes a line apart at blanks and drops the comment. A "#" inside a word
// stays there, to be refused: in a URI it should have been percent-encoded.
func split(line string) []word {
	var words []word
	for i := 0; i < len(line); {
		if isBlank(line[i]) {
			i++
			continue
		}
		if line[i] == '#' {
			break
		}
		start := i
		for i < len(line) && !isBlank(line[i]) {
			i++
		}
		words = append(words, word{line[start:i], start + 1})
	}
	return words
}

func parseEndpoint(words []word) (endpoint Endpoint, column int, reason string) {
	want := 2
	if first := words[0].text; len(first) >= 7 && strings.EqualFold(first[:7], "pkcs11:") {
		want = 1
		endpoint, column, reason = parseURI(words[0])
	} else {
		endpoint, column, reason = parseAddress(words)
	}
	if reason == "" && len(words) > want {
		return Endpoint{}, words[want].column, "unexpected text after the endpoint (a comment starts with #)"
	}
	return endpoint, column, reason
}

func parseURI(w word) (Endpoint, int, string) {
	uri, err := pkcs11uri.ParseOnly(w.text, uriAttributes...)
	if bad := (*pkcs11uri.Error)(nil); errors.As(err, &bad) {
		reason := bad.Reason
		if bad.Attribute != "" {
			reason = "attribute " + bad.Attribute + " " + reason
		}
		return Endpoint{}, w.column + bad.Offset, reason
	}
	if uri.ModulePath == "" {
		return Endpoint{}, w.column, "the URI has no module-path, the path of the PKCS#11 library"
	}
	if uri.Token == "" && uri.Serial == "" && uri.SlotID == nil {
		return Endpoint{}, w.column, "the URI names no token by token, serial or slot-id"
	}
	endpoint := Endpoint{
		ModulePath: uri.ModulePath, Token: uri.Token, Serial: uri.Serial, Slot: uri.SlotID,
		PINSource: uri.PINSource,
	}
	if uri.PINValue != "" {
		endpoint.pinValue = &uri.PINValue
	}
	return endpoint, 0, ""
}

func parseAddress(words []word) (Endpoint, int, string) {
	address := words[0]
	if len(words) == 1 {
		reason := "the port is missing"
		if _, _, err := net.SplitHostPort(address.text); err == nil {
			reason += "; write it after a blank, not after a colon"
		}
		return Endpoint{}, address.column + len(address.text), reason
	}
	host, reason := parseHost(address.text)
	if reason != "" {
		return Endpoint{}, address.column, reason
	}
	text := words[1].text
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || port == 0 || text[0] == '0' {
		return Endpoint{}, words[1].column, "the port must be a number from 1 to 65535"
	}
	return Endpoint{Host: host, Port: uint16(port)}, 0, ""
}

// parseHost checks an address and returns it in the form of Endpoint.Host.
func parseHost(text string) (host, reason string) {
	inner, bracketed := strings.CutPrefix(text, "[")
	if bracketed {
		var closed bool
		if inner, closed = strings.CutSuffix(inner, "]"); !closed {
			return "", "the bracket of the address is not closed"
		}
	}
	if addr, err := netip.ParseAddr(inner); err == nil && (addr.Is6() || !bracketed) {
		return addr.String(), ""
	}
	if bracketed || strings.Contains(text, ":") {
		return "", "not an IPv6 address"
	}
	name := strings.TrimSuffix(text, ".")
	if len(name) > 253 {
		return "", "a DNS name has at most 253 characters"
	}
	labels := strings.Split(name, ".")
	if !slices.ContainsFunc(labels, func(label string) bool { return !isLabel(label) }) {
		// No top-level domain is a number, but a mistyped IPv4 address ends in one.
		if last := labels[len(labels)-1]; strings.Trim(last, "0123456789") != "" {
			return text, ""
		}
		return "", "not an IPv4 address"
	}
	return "", "neither an IP address nor a DNS name"
}

// isLabel accepts what resolvers do: letters, digits, hyphens inside, and the
// underscores of container networks.
func isLabel(label string) bool {
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"
	return label != "" && len(label) <= 63 && strings.Trim(label, letters) == "" &&
		label[0] != '-' && label[len(label)-1] != '-'
}
