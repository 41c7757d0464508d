// Package jws signs and verifies tokens (JWS, RFC 7515; JWT, RFC 7519) with keys
// that stay in an HSM.
//
// # Signing
//
// A [Signer] is one key with one algorithm and one protected header:
//
//	signer, err := jws.NewSigner(key, jws.Options{Type: "JWT"})
//	...
//	token, err := signer.SignClaims(ctx, jwt.Claims{Subject: "alice", Expiry: jwt.NewNumericDate(inAnHour)})
//
// The claims may be any value that is a JSON object, see [MarshalClaims];
// [Signer.Sign] takes any payload, [Signer.SignFormat] writes the JSON forms, and
// [Signer.Jose] is the same signer for go-jose's own API.
//
// Make one signer and keep it: it is safe for concurrent use, and everything that
// can go wrong with options goes wrong when it is made, before a key is touched.
// go-jose writes the protected header then, once, and a token costs its
// signature and little else. The bytes are those that go-jose would write.
//
// The algorithms are RS256, RS384, RS512, PS256, PS384, PS512 (with a salt as
// long as the hash), ES256, ES384, ES512, EdDSA (Ed25519), HS256, HS384 and
// HS512. There is no "none". [FromSigner] signs with keys of other libraries, as
// long as they are a [crypto.Signer].
//
// # Verifying
//
// A [Verifier] is made with a list of algorithms, without which there is none:
//
//	verifier, err := jws.NewVerifier(keys, jws.VerifierOptions{Algorithms: []hsmkey.Algorithm{hsmkey.ES256}})
//	...
//	var claims jwt.Claims
//	_, err = verifier.VerifyClaims(ctx, token, &claims)
//
// The keys are a [jwk.Set], or one key ([NewKeyVerifier]). Verifying needs no HSM
// but for HMAC, whose secret does not leave it. An algorithm must be on the list,
// fit the type of the key, and be the one that the JWK names; keys and
// certificates that a token brings along are never trusted. Critical extensions
// are refused, all of them.
//
// The content of a token that does not verify cannot be had here at all. Whoever
// needs it, to choose among issuers for instance, finds it in go-jose under a
// name that says what it is: UnsafePayloadWithoutVerification.
package jws
