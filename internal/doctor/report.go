// Package doctor checks whether signing works, and if not, why: the PKCS#11
// library, the token, the PIN, the login, the mechanisms, the key, on one HSM or
// on every endpoint of balance lists.
package doctor

import (
	"fmt"
	"time"

	"github.com/hsmkey/hsmkey"
)

// Status is the outcome of a check.
type Status string

// The outcomes of checks.
const (
	OK   Status = "ok"
	Warn Status = "warn" // it works, but somebody should look at it
	Fail Status = "fail"
)

// Check is one thing that was looked at. What could not be looked at because of
// an earlier failure is not there.
type Check struct {
	Name   string `json:"name"`
	Status Status `json:"status"`
	Detail string `json:"detail"`
	Hint   string `json:"hint,omitempty"` // what to do, unless the status is ok
	Err    error  `json:"-"`              // what failed
}

// Report is everything that was found out. It holds no secret.
type Report struct {
	Status    Status      `json:"status"` // the worst of all
	Checks    []Check     `json:"checks"`
	Endpoints []*Endpoint `json:"endpoints,omitempty"` // of the balance lists
	Keys      []Key       `json:"keys,omitempty"`      // of the endpoints, unless one key was asked for
}

// Endpoint is what was found out about one endpoint of a balance list.
type Endpoint struct {
	Name       string             `json:"endpoint"`
	List       string             `json:"list,omitempty"` // "": the only HSM
	Status     Status             `json:"status"`
	Transport  Transport          `json:"transport"`
	Library    string             `json:"library,omitempty"`
	Token      string             `json:"token,omitempty"`
	Serial     string             `json:"serial,omitempty"`
	Login      Login              `json:"login,omitempty"`
	Algorithms []hsmkey.Algorithm `json:"algorithms,omitempty"`
	Sessions   int                `json:"sessions,omitempty"`       // the most that we use at once
	TokenLimit uint               `json:"token_sessions,omitempty"` // what the token allows, 0: it does not say
	RoundTrip  Milliseconds       `json:"round_trip_ms,omitempty"`
	Key        KeyState           `json:"key,omitempty"`          // of the key that was asked for
	Signature  Milliseconds       `json:"signature_ms,omitempty"` // with it
	UsableKeys int                `json:"usable_keys,omitempty"`  // where none was asked for: those that are for tokens
	SignedKeys int                `json:"signed_keys,omitempty"`  // and those of them that signed, of the first 16
	Checks     []Check            `json:"checks"`

	keys   []sighting
	listed bool // keys are all that there are
}

// Transport is how an endpoint is reached.
type Transport string

// The ways to endpoints.
const (
	InProcess Transport = "in-process" // a library of this machine
	TLS       Transport = "TLS"
	Plaintext Transport = "plaintext"
	Vendor    Transport = "vendor" // the vendor's library goes to an address, as it sees fit
)

// Login is how a login went.
type Login string

// The outcomes of logins.
const (
	Verified   Login = "verified"   // the token accepted the PIN
	Unverified Login = "unverified" // somebody else had logged in already
	NotNeeded  Login = "not needed"
	NoPIN      Login = "no PIN" // none is configured
)

// KeyState is what became of the search for a key on one endpoint.
type KeyState string

// The outcomes of searches for a key.
const (
	Usable    KeyState = "ok" // and the same as elsewhere
	Missing   KeyState = "missing"
	Different KeyState = "different"
	Ambiguous KeyState = "ambiguous"
	Unusable  KeyState = "unusable" // it signs no tokens
)

// Key is a name that keys have on endpoints.
type Key struct {
	Label  string         `json:"label,omitempty"`
	ID     string         `json:"id,omitempty"` // in hexadecimal digits, where there is no label
	Status Status         `json:"status"`
	Type   hsmkey.KeyType `json:"type,omitempty"`
	KeyID  string         `json:"kid,omitempty"`
	Detail string         `json:"detail"`
	Hint   string         `json:"hint,omitempty"`
	Err    error          `json:"-"`

	Missing   []string `json:"missing,omitempty"`   // endpoints without it
	Different []string `json:"different,omitempty"` // endpoints with another key
	Ambiguous []string `json:"ambiguous,omitempty"` // endpoints with several
}

// Milliseconds is a duration in JSON.
type Milliseconds time.Duration

// MarshalJSON writes milliseconds with three digits after the point.
func (m Milliseconds) MarshalJSON() ([]byte, error) {
	return fmt.Appendf(nil, "%.3f", float64(m)/float64(time.Millisecond)), nil
}

// String is the duration in words: 0.12 ms.
func (m Milliseconds) String() string {
	ms := float64(m) / float64(time.Millisecond)
	switch {
	case m == 0:
		return ""
	case ms < 1:
		return fmt.Sprintf("%.3f ms", ms)
	case ms < 10:
		return fmt.Sprintf("%.1f ms", ms)
	}
	return fmt.Sprintf("%.0f ms", ms)
}

// Failure is a check that failed, and where.
type Failure struct {
	Check
	Endpoint string // "" : no endpoint of a list
}

// Failures lists what failed, in the order of the report.
func (r *Report) Failures() []Failure {
	var all []Failure
	add := func(endpoint string, checks []Check) {
		for _, c := range checks {
			if c.Status == Fail {
				all = append(all, Failure{c, endpoint})
			}
		}
	}
	add("", r.Checks)
	for _, e := range r.Endpoints {
		add(e.Name, e.Checks)
	}
	for _, k := range r.Keys {
		if k.Status == Fail {
			all = append(all, Failure{Check: Check{"key " + k.Name(), k.Status, k.Detail, k.Hint, k.Err}})
		}
	}
	return all
}

// Name is the key's label in quotes, or its id.
func (k Key) Name() string {
	if k.Label != "" {
		return fmt.Sprintf("%q", k.Label)
	}
	return "id " + k.ID
}

// worst makes a status no better than another.
func (s *Status) worst(other Status) {
	if *s == "" || other == Fail || other == Warn && *s == OK {
		*s = other
	}
}

// conclude fills in what follows from the checks.
func (r *Report) conclude() {
	r.Status = OK
	for _, c := range r.Checks {
		r.Status.worst(c.Status)
	}
	for _, e := range r.Endpoints {
		e.Status = OK
		for _, c := range e.Checks {
			e.Status.worst(c.Status)
		}
		r.Status.worst(e.Status)
	}
	for _, k := range r.Keys {
		r.Status.worst(k.Status)
	}
}

// failure is an error in words of its own that matches a sentinel, and its cause
// if it has one.
func failure(sentinel, cause error, format string, args ...any) error {
	return &failed{fmt.Sprintf(format, args...), sentinel, cause}
}

type failed struct {
	text            string
	sentinel, cause error
}

func (f *failed) Error() string {
	if f.cause == nil {
		return f.text
	}
	return f.text + ": " + f.cause.Error()
}

func (f *failed) Unwrap() []error {
	if f.cause == nil {
		return []error{f.sentinel}
	}
	return []error{f.sentinel, f.cause}
}

// checks is a list of checks that is being made.
type checks []Check

func (c *checks) ok(name, format string, args ...any) {
	*c = append(*c, Check{Name: name, Status: OK, Detail: fmt.Sprintf(format, args...)})
}

func (c *checks) warn(name, hint, format string, args ...any) {
	*c = append(*c, Check{Name: name, Status: Warn, Detail: fmt.Sprintf(format, args...), Hint: hint})
}

func (c *checks) fail(name string, err error, hint string) {
	*c = append(*c, Check{Name: name, Status: Fail, Detail: err.Error(), Hint: hint, Err: err})
}
