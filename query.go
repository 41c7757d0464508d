package hsmkey

import (
	"bytes"
	"fmt"
	"strings"
)

// Query names one key on the HSM. Fields that are set must all match; at least
// one must be set. Neither labels nor ids are unique in PKCS#11, so a query
// that matches two keys is answered with ErrAmbiguous.
type Query struct {
	// Label is the key's CKA_LABEL. Trailing spaces, with which some modules pad
	// their labels, do not count.
	Label string

	// ID is the key's CKA_ID.
	ID []byte
}

// String describes the query in words: label "demo" and id 0a0b.
func (q Query) String() string {
	var parts []string
	if q.Label != "" {
		parts = append(parts, fmt.Sprintf("label %q", q.Label))
	}
	if len(q.ID) > 0 {
		parts = append(parts, fmt.Sprintf("id %x", q.ID))
	}
	if len(parts) == 0 {
		return "no label and no id"
	}
	return strings.Join(parts, " and ")
}

func (q Query) check() error {
	if trimLabel(q.Label) == "" && len(q.ID) == 0 {
		return fmt.Errorf("%w: a key is looked up by its label or id, and both are empty", ErrInvalid)
	}
	return nil
}

// clone protects against a caller that writes to its ID later.
func (q Query) clone() Query {
	q.ID = bytes.Clone(q.ID)
	return q
}

// matches reports whether an object that came back is one that was asked for.
func (q Query) matches(label string, id []byte) bool {
	return (q.Label == "" || trimLabel(q.Label) == trimLabel(label)) &&
		(len(q.ID) == 0 || bytes.Equal(q.ID, id))
}

// trimLabel takes off the padding that some modules put behind labels.
func trimLabel(label string) string { return strings.TrimRight(label, " \x00") }
