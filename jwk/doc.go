// Package jwk publishes signing keys: the public half of a key that lives in
// an HSM, as a JSON Web Key (RFC 7517) or a set of them (JWKS), so that others
// can verify what the HSM signed.
//
// # What a key looks like
//
//	key, err := hsm.Key(ctx, hsmkey.Query{Label: "issuer"})
//	...
//	public, err := jwk.Public(key)
//	...
//	json.NewEncoder(os.Stdout).Encode(public)
//
// prints (wrapped)
//
//	{"use":"sig","kty":"EC","kid":"oKIywvGUpTVTyxMQ3bwIIeQUudfr_CkLMjCE19ECD-U",
//	 "crv":"P-256","alg":"ES256","x":"…","y":"…","key_ops":["verify"]}
//
// The kid is the key's thumbprint (RFC 7638, SHA-256, base64url) unless another
// one is asked for with [WithKeyID]. It depends on nothing but the key itself:
// the same key restored on another HSM, or imported again under another label,
// keeps its kid, and a token's kid leads to the right key in any set that
// contains it. [crypto.Signer]s of other libraries get theirs by [FromPublic].
//
// # Nothing private
//
// A [Key] is made from a public key and cannot hold anything else: a private or
// symmetric key given by mistake is refused with [ErrPrivate], and so is a JWK
// or JWKS with private members when it is read. An HMAC key has no public half,
// so [Public] answers [hsmkey.ErrUnsupported].
//
// Keys and sets are immutable and may be used by several goroutines at once.
package jwk
