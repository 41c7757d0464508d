package hsmkey

import (
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// errWantsPIN says that the key turned out to want a login before each
// signature, on this token, which nobody had a PIN ready for. Reading it can
// take long, so that is not done on the session's goroutine.
var errWantsPIN = errors.New("the key wants the PIN before each signature")

// signAfterLogin signs with a key whose CKA_ALWAYS_AUTHENTICATE is true (PKCS#11
// v2.40, section 4.9): the login that authorises a signature stands between the
// start of the operation and the signature. A login that fails leaves the
// operation open, which the session's next user notices and the pool mends.
func (a *attempt) signAfterLogin(m sessionpool.Module, h pkcs11.SessionHandle, key pkcs11.ObjectHandle) ([]byte, error) {
	if a.pin == "" {
		return nil, errWantsPIN
	}
	if err := m.SignInit(h, []*pkcs11.Mechanism{a.way.mechanism}, key); err != nil {
		return nil, &refusal{a.way.name, err}
	}
	if err := m.Login(h, pkcs11.CKU_CONTEXT_SPECIFIC, a.pin); err != nil {
		return nil, fmt.Errorf("the login before a signature with the key with %s: %w", a.key, err)
	}
	signature, err := m.Sign(h, a.data)
	if err != nil {
		return nil, &refusal{a.way.name, err}
	}
	return signature, nil
}
