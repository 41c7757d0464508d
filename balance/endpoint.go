package balance

import (
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/hsmkey/hsmkey/internal/pkcs11uri"
)

// Endpoint is one HSM of a list. It is either an address (Host and Port), or a
// token of a PKCS#11 library on this machine (ModulePath and what names the
// token: Token, Serial, Slot, of which those that are set must all match).
type Endpoint struct {
	Host string // IP address without brackets, or DNS name
	Port uint16

	ModulePath string // absolute path of the PKCS#11 library
	Token      string // label of the token
	Serial     string // serial number of the token
	Slot       *uint  // slot that the token is in
	PINSource  string // absolute path of the file that holds the PIN, if the URI names one

	pinValue *string // a pointer, so that printing a structure never shows it

	line, column int // in its list, from 1
}

// uriAttributes are the attributes of a PKCS#11 URI that an Endpoint honours.
var uriAttributes = []string{"token", "serial", "slot-id", "module-path", "pin-source", "pin-value"}

// PINValue returns the PIN that the URI itself contained, "" if it had none.
func (e Endpoint) PINValue() string {
	if e.pinValue == nil {
		return ""
	}
	return *e.pinValue
}

// String returns "host:port", or the PKCS#11 URI without its PIN. No two
// endpoints of a list have the same.
func (e Endpoint) String() string {
	if e.ModulePath == "" {
		return net.JoinHostPort(e.Host, strconv.Itoa(int(e.Port)))
	}
	return pkcs11uri.URI{
		Token: e.Token, Serial: e.Serial, SlotID: e.Slot,
		PINSource: e.PINSource, ModulePath: e.ModulePath,
	}.String()
}

// Endpoint returns what the list says of the member.
func (e Member) Endpoint() Endpoint { return e.m.endpoint }

// Equal reports whether both endpoints are the same in everything, their PINs
// included.
func (e Endpoint) Equal(other Endpoint) bool {
	return e.String() == other.String() && e.PINValue() == other.PINValue()
}

// identity is the same for endpoints that lead to the same HSM, as far as that
// can be told from how they are written.
func (e Endpoint) identity() string {
	if addr, err := netip.ParseAddr(e.Host); err == nil {
		e.Host = addr.Unmap().String()
	} else {
		e.Host = strings.ToLower(strings.TrimSuffix(e.Host, "."))
	}
	e.PINSource = ""
	return e.String()
}
