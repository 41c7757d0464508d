package hsmkey_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"unsafe"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// newNSS makes a database of NSS with a user PIN, and the configuration to it.
// Its module wants an initialisation string, has a slot whose token has no PIN,
// and other ideas of several attributes than SoftHSM2.
func newNSS(t *testing.T) hsmkey.Config {
	t.Helper()
	module := softoken(t)
	args := fmt.Sprintf("configdir='sql:%s' certPrefix='' keyPrefix='' secmod='secmod.db' flags=", t.TempDir())
	if err := initNSS(module, args); err != nil {
		t.Fatalf("making an NSS database: %v", err)
	}
	return hsmkey.Config{Pool: sessionpool.Config{
		Module: module, ModuleArgs: args,
		TokenLabel: "NSS Certificate DB",
		PIN:        sessionpool.StaticPIN(testhsm.PIN),
		OpTimeout:  slow,
	}}
}

// softoken finds NSS's PKCS#11 module.
func softoken(t *testing.T) string {
	t.Helper()
	for _, place := range []string{"/usr/lib/*-linux-gnu*", "/usr/lib64", "/usr/lib", "/opt/homebrew/opt/nss/lib"} {
		for _, name := range []string{"libsoftokn3.so", "libsoftokn3.dylib"} {
			if found, err := filepath.Glob(filepath.Join(place, name)); err == nil && len(found) > 0 {
				return found[0]
			}
		}
	}
	t.Fatal("libsoftokn3 not found: install the Debian package libnss3 (or run `make deps`)")
	return ""
}

// initNSS sets the user PIN of a new database, as its owner does once.
func initNSS(module, args string) error {
	p := pkcs11.New(module)
	if p == nil {
		return fmt.Errorf("cannot load %s", module)
	}
	reserved := append([]byte(args), 0)
	if err := p.Initialize(pkcs11.InitializeWithReserved(unsafe.Pointer(unsafe.SliceData(reserved)))); err != nil {
		return err
	}
	defer p.Finalize() //nolint:errcheck // the test that follows would notice
	const databaseSlot = 2
	session, err := p.OpenSession(databaseSlot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return err
	}
	if err := p.Login(session, pkcs11.CKU_SO, ""); err != nil {
		return err
	}
	if err := p.InitPIN(session, testhsm.PIN); err != nil {
		return err
	}
	return p.Logout(session)
}

func TestNSSMakesKeysThatSign(t *testing.T) {
	h := open(t, newNSS(t))
	for _, typ := range []hsmkey.KeyType{hsmkey.RSA2048, hsmkey.P256, hsmkey.P384, hsmkey.P521, hsmkey.HMAC256, hsmkey.HMAC512} {
		t.Run(string(typ), func(t *testing.T) {
			generate(t, h, string(typ), typ)
			key := mustFind(t, h, hsmkey.Query{Label: string(typ)})
			for _, algorithm := range key.Algorithms() {
				signature, err := key.SignJWS(context.Background(), algorithm, []byte("a.b"))
				if err != nil {
					t.Errorf("%s: %v", algorithm, err)
				} else if err := verify(key, algorithm, []byte("a.b"), signature); err != nil {
					t.Errorf("%s: %v", algorithm, err)
				}
			}
		})
	}
}

func TestNSSTakesKeysThatSignAndGivesThemUpAgain(t *testing.T) {
	c := newNSS(t)
	ctx := context.Background()
	h := open(t, c)
	keys := newKeys(t)
	delete(keys, hsmkey.Ed25519)
	for typ, private := range keys {
		if _, err := h.Import(ctx, string(typ), private, []byte(typ)); err != nil {
			t.Error(err)
		}
	}
	if _, err := h.Import(ctx, "secret", make([]byte, 64), nil); err != nil {
		t.Error(err)
	}
	if err := h.Close(ctx); err != nil {
		t.Fatal(err)
	}

	// The same database, found again by another program.
	h = open(t, c)
	before := listing(t, h)
	if len(before) != len(keys)+1 {
		t.Errorf("%d keys listed, want %d", len(before), len(keys)+1)
	}
	for label, info := range before {
		if info.Err != nil {
			t.Errorf("%s: %v", label, info.Err)
			continue
		}
		signOnce(t, info.Key)
		if private, ok := keys[hsmkey.KeyType(label)]; ok && !samePublic(info.Key.Public(), private.Public()) {
			t.Errorf("%s has another public key", label)
		}
	}
	allSensitive(t, h, len(before))
	for label := range before {
		if err := h.Delete(ctx, hsmkey.Query{Label: label}); err != nil {
			t.Errorf("%s: %v", label, err)
		}
	}
	if n := objects(t, h); n != 0 {
		t.Errorf("%d objects are left", n)
	}
}

func TestNSSWithoutEd25519SaysSoAndKeepsNothing(t *testing.T) {
	h := open(t, newNSS(t))
	if _, err := h.Generate(context.Background(), "key", hsmkey.Ed25519, nil); !errors.Is(err, hsmkey.ErrUnsupported) {
		t.Errorf("Generate = %v, want ErrUnsupported", err)
	}
	if _, err := h.Import(context.Background(), "key", newKeys(t)[hsmkey.Ed25519], nil); !errors.Is(err, hsmkey.ErrUnsupported) {
		t.Errorf("Import = %v, want ErrUnsupported", err)
	}
	if n := objects(t, h); n != 0 {
		t.Errorf("%d objects are left", n)
	}
}

func TestNSSCertificatesGivePublicKeys(t *testing.T) {
	h := open(t, newNSS(t))
	made := generate(t, h, "key", hsmkey.P256)
	certify(t, h, made, "key", string(made.ID()))
	removePublic(t, h, made)
	if found := mustFind(t, h, hsmkey.Query{Label: "key"}); !samePublic(found.Public(), made.Public()) {
		t.Error("another public key")
	}
}
