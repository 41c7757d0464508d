package hsmkey

import (
	"crypto"
	_ "crypto/sha256" // the hashes that JOSE signs with
	_ "crypto/sha512"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// input is what a mechanism wants to be given.
type input uint8

const (
	inputDigest     input = iota // the hash of the message
	inputDigestInfo              // the hash in a DigestInfo (RFC 8017 section 9.2)
	inputMessage                 // the message
)

// way is one mechanism that yields the signatures of a scheme.
type way struct {
	mechanism *pkcs11.Mechanism // read only, shared
	name      string
	input     input
}

// scheme is a signature scheme and the ways to have it done, best first. The
// raw mechanism comes first: we hash faster than most HSMs, and a hash is a
// short message. Modules without it have the mechanism that hashes, too.
type scheme struct {
	id     schemeID
	name   string
	prefix []byte // of the DigestInfo
	ways   []way
}

// schemeID tells schemes apart.
type schemeID struct {
	family family
	hash   crypto.Hash
	salt   int // of PSS
}

type family uint8

const (
	familyPKCS1 family = iota
	familyPSS
	familyECDSA
	familyEdDSA
	familyHMAC
)

// hashInfo is what PKCS#11 calls a hash, and the mechanisms that use it.
type hashInfo struct {
	hash    crypto.Hash
	name    string
	number  uint // CKM_SHA*
	mgf     uint // CKG_MGF1_SHA*
	rsa     uint
	pss     uint
	ecdsa   uint
	hmac    uint
	prefix  []byte // of the DigestInfo (RFC 8017 section 9.2, note 1)
	pkcs1   *scheme
	pssHash *scheme // with a salt as long as the hash
	ec      *scheme
	mac     *scheme
}

var hashes = []*hashInfo{
	{
		hash: crypto.SHA256, name: "SHA256", number: pkcs11.CKM_SHA256, mgf: pkcs11.CKG_MGF1_SHA256,
		rsa: pkcs11.CKM_SHA256_RSA_PKCS, pss: pkcs11.CKM_SHA256_RSA_PKCS_PSS, ecdsa: pkcs11.CKM_ECDSA_SHA256, hmac: pkcs11.CKM_SHA256_HMAC,
		prefix: []byte{0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20},
	},
	{
		hash: crypto.SHA384, name: "SHA384", number: pkcs11.CKM_SHA384, mgf: pkcs11.CKG_MGF1_SHA384,
		rsa: pkcs11.CKM_SHA384_RSA_PKCS, pss: pkcs11.CKM_SHA384_RSA_PKCS_PSS, ecdsa: pkcs11.CKM_ECDSA_SHA384, hmac: pkcs11.CKM_SHA384_HMAC,
		prefix: []byte{0x30, 0x41, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02, 0x05, 0x00, 0x04, 0x30},
	},
	{
		hash: crypto.SHA512, name: "SHA512", number: pkcs11.CKM_SHA512, mgf: pkcs11.CKG_MGF1_SHA512,
		rsa: pkcs11.CKM_SHA512_RSA_PKCS, pss: pkcs11.CKM_SHA512_RSA_PKCS_PSS, ecdsa: pkcs11.CKM_ECDSA_SHA512, hmac: pkcs11.CKM_SHA512_HMAC,
		prefix: []byte{0x30, 0x51, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x03, 0x05, 0x00, 0x04, 0x40},
	},
}

// edDSA is Ed25519 as RFC 8037 uses it. The mechanism gets no parameter: an
// empty CK_EDDSA_PARAMS fails on several modules.
var edDSA = &scheme{
	id: schemeID{family: familyEdDSA}, name: "Ed25519",
	ways: []way{{pkcs11.NewMechanism(ckmEdDSA, nil), "CKM_EDDSA", inputMessage}},
}

// schemes are those of JOSE's algorithms.
var schemes = makeSchemes()

func makeSchemes() map[Algorithm]*scheme {
	all := map[Algorithm]*scheme{EdDSA: edDSA}
	for i, h := range hashes {
		h.pkcs1 = &scheme{
			id: schemeID{family: familyPKCS1, hash: h.hash}, name: "RSA PKCS #1 v1.5 with " + h.name,
			prefix: h.prefix,
			ways: []way{
				{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS, nil), "CKM_RSA_PKCS", inputDigestInfo},
				{pkcs11.NewMechanism(h.rsa, nil), "CKM_" + h.name + "_RSA_PKCS", inputMessage},
			},
		}
		h.pssHash = h.newPSS(h.hash.Size())
		h.ec = &scheme{
			id: schemeID{family: familyECDSA, hash: h.hash}, name: "ECDSA with " + h.name,
			ways: []way{
				{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil), "CKM_ECDSA", inputDigest},
				{pkcs11.NewMechanism(h.ecdsa, nil), "CKM_ECDSA_" + h.name, inputMessage},
			},
		}
		h.mac = &scheme{
			id: schemeID{family: familyHMAC, hash: h.hash}, name: "HMAC with " + h.name,
			ways: []way{{pkcs11.NewMechanism(h.hmac, nil), "CKM_" + h.name + "_HMAC", inputMessage}},
		}
		bits := h.name[len("SHA"):]
		all[Algorithm("RS"+bits)] = h.pkcs1
		all[Algorithm("PS"+bits)] = h.pssHash
		all[[]Algorithm{ES256, ES384, ES512}[i]] = h.ec
		all[Algorithm("HS"+bits)] = h.mac
	}
	return all
}

// newPSS is RSASSA-PSS with MGF1 of the same hash and a salt of so many bytes.
func (h *hashInfo) newPSS(salt int) *scheme {
	params := pkcs11.NewPSSParams(h.number, h.mgf, uint(salt))
	return &scheme{
		id: schemeID{family: familyPSS, hash: h.hash, salt: salt}, name: "RSA-PSS with " + h.name,
		ways: []way{
			{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_PSS, params), "CKM_RSA_PKCS_PSS", inputDigest},
			{pkcs11.NewMechanism(h.pss, params), "CKM_" + h.name + "_RSA_PKCS_PSS", inputMessage},
		},
	}
}

func hashFor(hash crypto.Hash) (*hashInfo, error) {
	for _, h := range hashes {
		if h.hash == hash {
			return h, nil
		}
	}
	return nil, fmt.Errorf("%w: signing with %v; there are SHA-256, SHA-384 and SHA-512", ErrUnsupported, hash)
}

// TokenAlgorithms lists what a token signs, by the list of its mechanisms. Lists
// are not always honest: only a signature proves that a key signs.
func TokenAlgorithms(t *sessionpool.Token) []Algorithm {
	var able []Algorithm
	for _, algorithm := range []Algorithm{RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, ES512, EdDSA, HS256, HS384, HS512} {
		if slices.ContainsFunc(schemes[algorithm].ways, func(w way) bool { return t.Supports(w.mechanism.Mechanism) }) {
			able = append(able, algorithm)
		}
	}
	return able
}

// plan is the order in which the ways of a scheme are tried on one token, and
// what became of each. It belongs to one call.
type plan struct {
	scheme  *scheme
	token   *sessionpool.Token
	refused [2]bool
	deaths  [2]uint8 // sessions lost under a way: how some modules refuse
	cause   error    // the last refusal
	message error    // a refusal of the message, not of the way
}

// next returns the way to try, or -1 if all were refused. The one that worked
// before comes first, then those that the token lists, then the others, because
// lists of mechanisms are not always honest.
func (p *plan) next(worked int, withMessage bool) int {
	best, rank := -1, 0
	for i, w := range p.scheme.ways {
		if p.refused[i] || w.input == inputMessage && !withMessage {
			continue
		}
		r := 0
		switch {
		case p.deaths[i] > 1:
			r = -1
		case i == worked:
			r = 2
		case p.token.Supports(w.mechanism.Mechanism):
			r = 1
		}
		if best < 0 || r > rank {
			best, rank = i, r
		}
	}
	return best
}

// settle takes note of a failure. It reports whether the way was refused, so
// that another one is worth trying in the same session.
func (p *plan) settle(i int, err error) bool {
	var r *refusal
	var u *unlocated
	if !errors.As(err, &r) || errors.As(err, &u) {
		return false
	}
	if errors.Is(err, ErrSession) {
		p.deaths[i]++
		return false
	}
	p.refused[i], p.cause = true, r
	if p.scheme.ways[i].input == inputMessage && (isCode(err, pkcs11.CKR_DATA_LEN_RANGE) || isCode(err, pkcs11.CKR_DATA_INVALID)) {
		p.message = r
	}
	return true
}

// unfit says that the token signs, but not this message.
func (p *plan) unfit(length int) error {
	return fmt.Errorf("%w: %s does not sign a message of %d bytes: %w", ErrInvalid, p.token.Name(), length, p.message)
}

// unsupported says what was tried in vain.
func (p *plan) unsupported(withMessage bool) error {
	var tried []string
	for _, w := range p.scheme.ways {
		if w.input != inputMessage || withMessage {
			tried = append(tried, w.name)
		}
	}
	err := fmt.Errorf("%w: %s does not sign by %s (%s)", ErrUnsupported, p.token.Name(), p.scheme.name, strings.Join(tried, ", "))
	if p.cause != nil {
		err = fmt.Errorf("%w: %w", err, p.cause)
	}
	return err
}

// refusal is the token's answer to a signature by one mechanism.
type refusal struct {
	mechanism string
	cause     error
}

func (r *refusal) Error() string { return r.mechanism + ": " + r.cause.Error() }
func (r *refusal) Unwrap() error { return r.cause }
