package hsmkey

import (
	"context"
	"fmt"

	"github.com/miekg/pkcs11"
)

// Generate makes a key on the HSM and returns it. The private key or secret is
// sensitive and cannot be extracted; it signs, and an RSA key also decrypts. id
// is the CKA_ID of both halves; nil gives 16 random bytes.
//
// The error matches ErrExists if a private or secret key has this label or id
// already, or got it from another process meanwhile; ErrUnsupported if the token does not make keys of this type,
// ErrInvalid if label or type cannot be used. An error leaves nothing behind.
// Generation is never repeated on another session. With balance lists it is
// ErrUnsupported: it would make a key on one HSM of many.
func (h *HSM) Generate(ctx context.Context, label string, typ KeyType, id []byte) (*HSMJWK, error) {
	typ, err := ParseKeyType(string(typ))
	if err != nil {
		return nil, err
	}
	if h.balancer != nil {
		return nil, fmt.Errorf("%w: a key is generated on one HSM, and there is a balance list: import a key into all, or replicate one with the vendor's backup", ErrUnsupported)
	}
	if err := checkLabel(label); err != nil {
		return nil, err
	}
	if err := h.beginMaking(ctx); err != nil {
		return nil, err
	}
	defer h.endMaking()
	return create(ctx, h.source, label, id, string(typ), generators(typ), nil)
}

// generators are the recipes for each of [KeyTypes].
func generators(typ KeyType) []recipe {
	switch typ {
	case RSA2048:
		return []recipe{generateRSA(2048)}
	case RSA3072:
		return []recipe{generateRSA(3072)}
	case RSA4096:
		return []recipe{generateRSA(4096)}
	}
	for _, h := range hmacs {
		if h.typ == typ {
			return []recipe{generateSecret(ckkGenericSecret, h.size), generateSecret(h.keyType, h.size)}
		}
	}
	for _, c := range curves {
		if c.typ == typ && c.name == nil {
			return []recipe{generateEC(c, c.params)}
		} else if c.typ == typ {
			return []recipe{generateEC(c, c.params), generateEC(c, c.name)}
		}
	}
	return nil
}

func generateRSA(bits uint) recipe {
	return func(k *maker) error {
		return k.generatePair(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN,
			append(k.publicTemplate(),
				attr(pkcs11.CKA_ENCRYPT, true),
				attr(pkcs11.CKA_MODULUS_BITS, bits),
				attr(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1})),
			append(k.privateTemplate(), attr(pkcs11.CKA_DECRYPT, true)))
	}
}

func generateEC(c *curve, params []byte) recipe {
	mechanism := uint(pkcs11.CKM_EC_KEY_PAIR_GEN)
	if c == curveEd25519 {
		mechanism = ckmECEdwardsKeyPairGen
	}
	return func(k *maker) error {
		return k.generatePair(mechanism,
			append(k.publicTemplate(), attr(pkcs11.CKA_EC_PARAMS, params)),
			k.privateTemplate())
	}
}

func generateSecret(keyType, size uint) recipe {
	return func(k *maker) error {
		handle, err := k.module.GenerateKey(k.session,
			[]*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_GENERIC_SECRET_KEY_GEN, nil)},
			append(k.secretTemplate(keyType), attr(pkcs11.CKA_VALUE_LEN, size)))
		if err == nil {
			k.made = append(k.made, handle)
		}
		return err
	}
}

func (k *maker) generatePair(mechanism uint, public, private []*pkcs11.Attribute) error {
	pub, priv, err := k.module.GenerateKeyPair(k.session,
		[]*pkcs11.Mechanism{pkcs11.NewMechanism(mechanism, nil)}, public, private)
	if err == nil {
		k.made = append(k.made, pub, priv)
	}
	return err
}

// The templates hold what all keys of a class have in common.

func (k *maker) publicTemplate() []*pkcs11.Attribute {
	return []*pkcs11.Attribute{
		attr(pkcs11.CKA_TOKEN, true),
		attr(pkcs11.CKA_PRIVATE, false),
		attr(pkcs11.CKA_LABEL, k.label),
		attr(pkcs11.CKA_ID, k.id),
		attr(pkcs11.CKA_VERIFY, true),
	}
}

func (k *maker) privateTemplate() []*pkcs11.Attribute {
	return []*pkcs11.Attribute{
		attr(pkcs11.CKA_TOKEN, true),
		attr(pkcs11.CKA_PRIVATE, true),
		attr(pkcs11.CKA_LABEL, k.label),
		attr(pkcs11.CKA_ID, k.id),
		attr(pkcs11.CKA_SENSITIVE, true),
		attr(pkcs11.CKA_EXTRACTABLE, false),
		attr(pkcs11.CKA_SIGN, true),
	}
}

func (k *maker) secretTemplate(keyType uint) []*pkcs11.Attribute {
	return append(k.privateTemplate(),
		attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		attr(pkcs11.CKA_KEY_TYPE, keyType),
		attr(pkcs11.CKA_VERIFY, true))
}
