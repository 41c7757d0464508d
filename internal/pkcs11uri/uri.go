// Package pkcs11uri reads and writes PKCS#11 URIs (RFC 7512).
//
// The reader is strict where a lenient one picks the wrong key or token:
// values are percent-decoded and nothing else (a "+" stays a "+", an id is the
// bytes it says), characters outside the grammar are refused, a path attribute
// that is not known is an error because it may have been meant to narrow the
// match (§2.5), and an attribute without a value is an error because URI could
// not tell it from an absent one, which matches everything.
//
// Vendor attributes in the query are read and dropped, repeated or not, as
// §2.4 allows. Only names that begin with "pin-" or "module-" are refused
// there: they are misspellings of the standard attributes, and dropping one
// would silently change where the PIN or the module comes from.
package pkcs11uri

import (
	"strconv"
	"strings"
)

// URI is a PKCS#11 URI. The zero value of a field means that the URI does not
// have that attribute.
type URI struct {
	// Attributes of the path (RFC 7512 §2.3): which token, which object.

	Token               string // CK_TOKEN_INFO label
	Manufacturer        string // CK_TOKEN_INFO manufacturerID
	Serial              string // CK_TOKEN_INFO serialNumber
	Model               string // CK_TOKEN_INFO model
	LibraryManufacturer string // CK_INFO manufacturerID
	LibraryDescription  string // CK_INFO libraryDescription
	LibraryVersion      string // CK_INFO libraryVersion, "major" or "major.minor"
	Object              string // CKA_LABEL
	Type                string // "public", "private", "cert", "secret-key" or "data"
	ID                  []byte // CKA_ID
	SlotManufacturer    string // CK_SLOT_INFO manufacturerID
	SlotDescription     string // CK_SLOT_INFO slotDescription
	SlotID              *uint  // CK_SLOT_ID

	// Attributes of the query (RFC 7512 §2.4): how to get there.

	PINSource  string // absolute path of the file that holds the PIN
	PINValue   string // the PIN itself; no method of URI ever prints it
	ModuleName string // name of the library without path, prefix and suffix
	ModulePath string // absolute path of the library
}

// String returns the URI in RFC 7512 form, in a fixed order and without
// pin-value. Parse of the result gives the same URI, except for its PINValue.
func (u URI) String() string {
	var b strings.Builder
	b.WriteString(scheme)
	writeAttributes(&b, &u, pathAttributes, "", ';', isPathChar)
	writeAttributes(&b, &u, queryAttributes, "?", '&', isQueryChar)
	return b.String()
}

// GoString is String: "%#v" prints no PIN either.
func (u URI) GoString() string { return u.String() }

// MarshalText is String: JSON, and with it log/slog, get no PIN either.
func (u URI) MarshalText() ([]byte, error) { return []byte(u.String()), nil }

func writeAttributes(b *strings.Builder, u *URI, table []attribute, lead string, separator byte, isChar func(byte) bool) {
	first := true
	for _, a := range table {
		value := a.get(u)
		if value == "" || a.secret {
			continue
		}
		if first {
			b.WriteString(lead)
			first = false
		} else {
			b.WriteByte(separator)
		}
		b.WriteString(a.name)
		b.WriteByte('=')
		if a.binary {
			isChar = func(byte) bool { return false } // §2.3: the whole id should be percent-encoded
		}
		for i := range len(value) {
			writeEscaped(b, value[i], isChar)
		}
	}
}

func writeEscaped(b *strings.Builder, c byte, isChar func(byte) bool) {
	if isChar(c) {
		b.WriteByte(c)
		return
	}
	const digits = "0123456789ABCDEF"
	b.WriteByte('%')
	b.WriteByte(digits[c>>4])
	b.WriteByte(digits[c&0xf])
}

// attribute ties a name of the RFC to a field of URI.
type attribute struct {
	name   string
	binary bool // bytes rather than text
	secret bool // never written
	get    func(*URI) string
	// set checks a decoded value and stores it; it returns what is wrong with
	// the value, without quoting it.
	set func(*URI, string) (problem string)
}

var pathAttributes = []attribute{
	text("token", func(u *URI) *string { return &u.Token }),
	text("manufacturer", func(u *URI) *string { return &u.Manufacturer }),
	text("serial", func(u *URI) *string { return &u.Serial }),
	text("model", func(u *URI) *string { return &u.Model }),
	text("library-manufacturer", func(u *URI) *string { return &u.LibraryManufacturer }),
	text("library-description", func(u *URI) *string { return &u.LibraryDescription }),
	{
		name: "library-version",
		get:  func(u *URI) string { return u.LibraryVersion },
		set:  setLibraryVersion,
	},
	text("object", func(u *URI) *string { return &u.Object }),
	{
		name: "type",
		get:  func(u *URI) string { return u.Type },
		set:  setType,
	},
	{
		name:   "id",
		binary: true,
		get:    func(u *URI) string { return string(u.ID) },
		set:    func(u *URI, value string) string { u.ID = []byte(value); return "" },
	},
	text("slot-manufacturer", func(u *URI) *string { return &u.SlotManufacturer }),
	text("slot-description", func(u *URI) *string { return &u.SlotDescription }),
	{
		name: "slot-id",
		get: func(u *URI) string {
			if u.SlotID == nil {
				return ""
			}
			return strconv.FormatUint(uint64(*u.SlotID), 10)
		},
		set: setSlotID,
	},
}

var queryAttributes = []attribute{
	{
		name: "pin-source",
		get: func(u *URI) string {
			if u.PINSource == "" {
				return ""
			}
			return "file://" + u.PINSource
		},
		set: setPINSource,
	},
	{
		name:   "pin-value",
		secret: true,
		get:    func(u *URI) string { return u.PINValue },
		set:    func(u *URI, value string) string { u.PINValue = value; return "" },
	},
	text("module-name", func(u *URI) *string { return &u.ModuleName }),
	{
		name: "module-path",
		get:  func(u *URI) string { return u.ModulePath },
		set:  setModulePath,
	},
}

func text(name string, field func(*URI) *string) attribute {
	return attribute{
		name: name,
		get:  func(u *URI) string { return *field(u) },
		set:  func(u *URI, value string) string { *field(u) = value; return "" },
	}
}
