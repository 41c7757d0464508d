// Package hsmkey signs with keys that never leave an HSM, over any PKCS#11
// module. It is the key layer of a toolkit for JSON Web Tokens: package jwk
// turns its keys into JWKs, package jws makes tokens with them.
//
// # A signature
//
//	config, err := hsmkey.FromEnv()      // HSM_MODULE, HSM_TOKEN, HSM_PIN ...
//	hsm, err := hsmkey.Open(ctx, config)
//	defer hsm.Close(ctx)
//	key, err := hsm.Key(ctx, hsmkey.Query{Label: "billing"})
//	signature, err := key.SignJWS(ctx, hsmkey.ES256, signingInput)
//
// An [HSM] is a source of sessions and the keys that can be reached through
// them. It is opened once and kept for as long as the program runs: it caches
// sessions, logs in once and again when the login is lost, and replaces what
// broke. An [HSMJWK] is one key. It holds no session and no PKCS#11 handle, only
// what is known of the key: its label and id, its public key, its algorithms.
// Both are safe for concurrent use, and there is nothing to gain from having
// more than one of either.
//
// Each signature takes a session from the cache and gives it back. In a session
// that is new to it the key is looked up, and its public key is compared with
// the known one; from then on, a signature is one call into the module. A key
// that was replaced under its name, or is another one on another HSM of a fleet,
// is never used: that is [ErrKeyMismatch]. When a session or an HSM fails under
// a signature, the signature is made again on another session. Keys are never
// made or deleted twice.
//
// # As a crypto.Signer
//
// An HSMJWK is a [crypto.Signer] and a [crypto.MessageSigner], so that it serves
// TLS, signs certificates and works wherever Go takes a private key. That
// interface has no context: [HSMJWK.WithContext] gives it one.
//
// # In one session
//
// Many signatures in a row need not go through the cache one by one:
// [HSMJWK.In] pins the key to a session that the caller holds, for as long as
// the caller holds it.
//
// # Keys
//
// [HSM.Generate] makes RSA keys of 2048, 3072 and 4096 bits, EC keys on P-256,
// P-384 and P-521, Ed25519 keys, and HMAC secrets. [HSM.Import] takes the same
// from outside. Private keys and secrets are sensitive and cannot be extracted.
// [HSM.Keys] lists what is there; a key that is of no use for tokens is listed
// with the reason and does not hide the others.
//
// A lookup proves that exactly one key matches. Labels and ids are not unique
// in PKCS#11, and the first match is not good enough to sign with.
//
// # What modules do
//
// PKCS#11 modules differ more than the standard allows. A public key is read
// from the private object, the public-key object or the certificate, whichever
// there is. Curves and points are read in every form that is in use. A module
// without CKM_RSA_PKCS, CKM_RSA_PKCS_PSS or CKM_ECDSA is served through the
// mechanisms that do the hashing themselves, and what worked is remembered. Keys
// that want the PIN before each signature (CKA_ALWAYS_AUTHENTICATE) get it.
//
// # Errors
//
// Every failure has a sentinel to be tested for with [errors.Is]: [ErrConfig],
// [ErrPIN], [ErrSession], [ErrTimeout], [ErrKeyNotFound], [ErrAmbiguous],
// [ErrKeyMismatch], [ErrExists], [ErrUnsupported], [ErrInvalid], [ErrMAC] and
// [ErrClosed]; or it is the error of the caller's context. Where PKCS#11
// answered with a code, [errors.As] finds it as a pkcs11.Error. An HSM that
// could not be asked is never reported as a key that was not found, and no error
// contains a PIN or a secret.
package hsmkey
