package sessionpool

import (
	"errors"

	"github.com/miekg/pkcs11"
)

// class is what a PKCS#11 return code says about the session it came through.
type class uint8

const (
	callerFault   class = iota // arguments, mechanism, data: the session is fine
	keyFault                   // the key cannot do this: the session is fine
	pinFault                   // the login was refused
	staleHandle                // the object handle is dead: find the object again
	loginLost                  // somebody logged out: log in again
	sessionBroken              // the session is gone or stuck in an operation
	tokenGone                  // no token in the slot
	hsmDown                    // the device does not work
	moduleLost                 // somebody finalised the library
)

// classes is the judgement on every return code of PKCS#11 v2.40 that is not
// the caller's fault; what is not listed is.
var classes = map[pkcs11.Error]class{
	pkcs11.CKR_KEY_SIZE_RANGE:             keyFault,
	pkcs11.CKR_KEY_TYPE_INCONSISTENT:      keyFault,
	pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED: keyFault,
	pkcs11.CKR_KEY_UNEXTRACTABLE:          keyFault,
	pkcs11.CKR_KEY_NOT_WRAPPABLE:          keyFault,
	pkcs11.CKR_KEY_INDIGESTIBLE:           keyFault,
	pkcs11.CKR_KEY_CHANGED:                keyFault,

	pkcs11.CKR_PIN_INCORRECT: pinFault,
	pkcs11.CKR_PIN_INVALID:   pinFault,
	pkcs11.CKR_PIN_LEN_RANGE: pinFault,
	pkcs11.CKR_PIN_EXPIRED:   pinFault,
	pkcs11.CKR_PIN_LOCKED:    pinFault,

	pkcs11.CKR_KEY_HANDLE_INVALID:    staleHandle,
	pkcs11.CKR_OBJECT_HANDLE_INVALID: staleHandle,

	pkcs11.CKR_USER_NOT_LOGGED_IN: loginLost,

	pkcs11.CKR_SESSION_HANDLE_INVALID:    sessionBroken,
	pkcs11.CKR_SESSION_CLOSED:            sessionBroken,
	pkcs11.CKR_OPERATION_ACTIVE:          sessionBroken,
	pkcs11.CKR_OPERATION_NOT_INITIALIZED: sessionBroken,
	pkcs11.CKR_FUNCTION_CANCELED:         sessionBroken,
	pkcs11.CKR_CANCEL:                    sessionBroken,

	pkcs11.CKR_TOKEN_NOT_PRESENT:    tokenGone,
	pkcs11.CKR_TOKEN_NOT_RECOGNIZED: tokenGone,
	pkcs11.CKR_DEVICE_REMOVED:       tokenGone,
	pkcs11.CKR_SLOT_ID_INVALID:      tokenGone,

	pkcs11.CKR_DEVICE_ERROR:    hsmDown,
	pkcs11.CKR_DEVICE_MEMORY:   hsmDown,
	pkcs11.CKR_GENERAL_ERROR:   hsmDown,
	pkcs11.CKR_FUNCTION_FAILED: hsmDown,
	pkcs11.CKR_HOST_MEMORY:     hsmDown,
	pkcs11.CKR_CANT_LOCK:       hsmDown,
	pkcs11.CKR_MUTEX_BAD:       hsmDown,

	pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED: moduleLost,
}

// classify judges the PKCS#11 code inside err; without one it is the caller's.
func classify(err error) class {
	var code pkcs11.Error
	if !errors.As(err, &code) {
		return callerFault
	}
	return classes[code]
}

// hasCode reports whether err holds a PKCS#11 return code.
func hasCode(err error) bool {
	var code pkcs11.Error
	return errors.As(err, &code)
}

// doubtful reports whether a module may mean "the login is lost" by a code of
// this class: then the session is asked what state it is in.
func (c class) doubtful() bool { return c == staleHandle || c == hsmDown }

// sessionFault reports whether the caller had no part in the failure.
func (c class) sessionFault() bool { return c >= staleHandle }

// untouched reports whether a call that failed so cannot have done anything, so
// that it is safe to make it again whatever it was.
func (c class) untouched() bool {
	return c == staleHandle || c == loginLost || c == sessionBroken || c == moduleLost
}

// gone reports whether the session's handle is certainly dead: it must not be
// closed, because the module may have given its number to another session. A
// shut gate says nothing of the kind: the library may not be finalised after all.
func gone(err error) bool {
	return !errors.Is(err, errShut) && (isCode(err, pkcs11.CKR_SESSION_HANDLE_INVALID) ||
		isCode(err, pkcs11.CKR_SESSION_CLOSED) || isCode(err, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED))
}

// rejectsPIN reports whether a login failed because the PIN is wrong. A locked
// user and an expired PIN say nothing about other tokens, or about tomorrow.
func rejectsPIN(err error) bool {
	return isCode(err, pkcs11.CKR_PIN_INCORRECT) || isCode(err, pkcs11.CKR_PIN_INVALID) || isCode(err, pkcs11.CKR_PIN_LEN_RANGE)
}

// isCode reports whether err holds the given return code.
func isCode(err error, code uint) bool { return errors.Is(err, pkcs11.Error(code)) }
