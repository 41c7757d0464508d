package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// bareMechanisms are what a program that calls PKCS#11 itself would use, and how
// many bytes it would sign.
var bareMechanisms = map[hsmkey.Algorithm]struct {
	mechanism *pkcs11.Mechanism
	class     uint
	size      int
}{
	hsmkey.RS256: {pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS, nil), pkcs11.CKO_PRIVATE_KEY, 51},
	hsmkey.RS384: {pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS, nil), pkcs11.CKO_PRIVATE_KEY, 67},
	hsmkey.RS512: {pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS, nil), pkcs11.CKO_PRIVATE_KEY, 83},
	hsmkey.PS256: {barePSS(pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256, 32), pkcs11.CKO_PRIVATE_KEY, 32},
	hsmkey.PS384: {barePSS(pkcs11.CKM_SHA384, pkcs11.CKG_MGF1_SHA384, 48), pkcs11.CKO_PRIVATE_KEY, 48},
	hsmkey.PS512: {barePSS(pkcs11.CKM_SHA512, pkcs11.CKG_MGF1_SHA512, 64), pkcs11.CKO_PRIVATE_KEY, 64},
	hsmkey.ES256: {pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil), pkcs11.CKO_PRIVATE_KEY, 32},
	hsmkey.ES384: {pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil), pkcs11.CKO_PRIVATE_KEY, 48},
	hsmkey.ES512: {pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil), pkcs11.CKO_PRIVATE_KEY, 64},
	hsmkey.EdDSA: {pkcs11.NewMechanism(ckmEdDSA, nil), pkcs11.CKO_PRIVATE_KEY, 300},
	hsmkey.HS256: {pkcs11.NewMechanism(pkcs11.CKM_SHA256_HMAC, nil), pkcs11.CKO_SECRET_KEY, 300},
	hsmkey.HS384: {pkcs11.NewMechanism(pkcs11.CKM_SHA384_HMAC, nil), pkcs11.CKO_SECRET_KEY, 300},
	hsmkey.HS512: {pkcs11.NewMechanism(pkcs11.CKM_SHA512_HMAC, nil), pkcs11.CKO_SECRET_KEY, 300},
}

// ckmEdDSA is CKM_EDDSA (PKCS#11 v3.0), which miekg's binding lacks.
const ckmEdDSA = 0x1057

func barePSS(hash, mgf, salt uint) *pkcs11.Mechanism {
	return pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_PSS, pkcs11.NewPSSParams(hash, mgf, salt))
}

// bareLoop makes C_SignInit and C_Sign in one session for as long as there is
// more to do.
func bareLoop(ctx context.Context, source sessionpool.Source, key *hsmkey.HSMJWK, alg hsmkey.Algorithm, more func() bool) error {
	bare, ok := bareMechanisms[alg]
	if !ok {
		return usagef("--compare knows no bare form of %s", alg)
	}
	s, err := source.Acquire(ctx)
	if err != nil {
		return err
	}
	defer s.Release()
	data := make([]byte, bare.size)
	return s.Do(ctx, func(m sessionpool.Module, h pkcs11.SessionHandle) error {
		handle, err := bareHandle(m, h, bare.class, key)
		if err != nil {
			return err
		}
		for more() {
			if err := m.SignInit(h, []*pkcs11.Mechanism{bare.mechanism}, handle); err != nil {
				return fmt.Errorf("--compare: %w", err)
			}
			if _, err := m.Sign(h, data); err != nil {
				return fmt.Errorf("--compare: %w", err)
			}
		}
		return nil
	})
}

func bareHandle(m sessionpool.Module, h pkcs11.SessionHandle, class uint, key *hsmkey.HSMJWK) (pkcs11.ObjectHandle, error) {
	template := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, class), pkcs11.NewAttribute(pkcs11.CKA_LABEL, key.Label())}
	if id := key.ID(); len(id) > 0 {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_ID, id))
	}
	if err := m.FindObjectsInit(h, template); err != nil {
		return 0, err
	}
	found, _, err := m.FindObjects(h, 1)
	if err := errors.Join(err, m.FindObjectsFinal(h)); err != nil {
		return 0, err
	}
	if len(found) == 0 {
		return 0, fmt.Errorf("%w: the bare loop does not find the key", hsmkey.ErrKeyNotFound)
	}
	return found[0], nil
}
