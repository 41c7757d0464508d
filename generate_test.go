package hsmkey_test

import (
	"bytes"
	"context"
	"errors"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/fault"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

func TestEveryTypeOfKeyIsGeneratedAndSigns(t *testing.T) {
	h := newHSM(t)
	ctx := context.Background()
	for _, typ := range hsmkey.KeyTypes() {
		t.Run(typ.String(), func(t *testing.T) {
			made := generate(t, h, "a "+typ.String(), typ)
			if made.Type() != typ || made.Label() != "a "+typ.String() || len(made.ID()) != 16 {
				t.Errorf("made %s %q %x", made.Type(), made.Label(), made.ID())
			}
			found, err := h.Key(ctx, hsmkey.Query{Label: made.Label()})
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(found.ID(), made.ID()) {
				t.Errorf("found id %x, made %x", found.ID(), made.ID())
			}
			if len(found.Algorithms()) == 0 {
				t.Fatal("no algorithms")
			}
			for _, algorithm := range found.Algorithms() {
				signature, err := found.SignJWS(ctx, algorithm, []byte("a.b"))
				if err != nil {
					t.Errorf("%s: %v", algorithm, err)
					continue
				}
				if err := verify(found, algorithm, []byte("a.b"), signature); err != nil {
					t.Errorf("%s: %v", algorithm, err)
				}
			}
		})
	}
}

func TestAKeyTypeIsReadInUpperAndLowerCase(t *testing.T) {
	for _, typ := range hsmkey.KeyTypes() {
		for _, s := range []string{string(typ), strings.ToUpper(string(typ)), strings.ToLower(string(typ))} {
			if got, err := hsmkey.ParseKeyType(s); got != typ || err != nil {
				t.Errorf("ParseKeyType(%q) = %s, %v", s, got, err)
			}
		}
	}
	for _, s := range []string{"", "rsa", "rsa:1024", "rsa:2048 ", "ec:P-224", "ec", "ed448", "hmac:128"} {
		if got, err := hsmkey.ParseKeyType(s); !errors.Is(err, hsmkey.ErrInvalid) {
			t.Errorf("ParseKeyType(%q) = %s, %v, want ErrInvalid", s, got, err)
		}
	}
	if _, err := newHSM(t).Generate(context.Background(), "key", "rsa:1024", nil); !errors.Is(err, hsmkey.ErrInvalid) {
		t.Errorf("Generate = %v, want ErrInvalid", err)
	}
}

func TestGenerationIsNeverRepeated(t *testing.T) {
	for _, code := range []uint{pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_USER_NOT_LOGGED_IN, pkcs11.CKR_GENERAL_ERROR} {
		injector := fault.New()
		h := wrapped(t, injector.Wrap)
		objects(t, h)
		injector.Fail("C_GenerateKeyPair", 1, code)
		_, err := h.Generate(context.Background(), "key", hsmkey.P256, nil)
		if !errors.Is(err, hsmkey.ErrSession) || !errors.Is(err, pkcs11.Error(code)) {
			t.Errorf("Generate = %v, want ErrSession with %v", err, pkcs11.Error(code))
		}
		if n := injector.Calls("C_GenerateKeyPair"); n != 1 {
			t.Errorf("C_GenerateKeyPair was called %d times, want once", n)
		}
		if err := h.Close(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestATokenThatDoesNotMakeSuchKeysSaysSo(t *testing.T) {
	injector := fault.New()
	h := wrapped(t, injector.Wrap)
	injector.FailAll("C_GenerateKeyPair", pkcs11.CKR_MECHANISM_INVALID)
	_, err := h.Generate(context.Background(), "key", hsmkey.Ed25519, nil)
	if !errors.Is(err, hsmkey.ErrUnsupported) || !errors.Is(err, pkcs11.Error(pkcs11.CKR_MECHANISM_INVALID)) || errors.Is(err, hsmkey.ErrSession) {
		t.Errorf("Generate = %v, want ErrUnsupported with the code", err)
	}
	if !strings.Contains(err.Error(), "ed25519") || !strings.Contains(err.Error(), testhsm.DefaultLabel) {
		t.Errorf("the error names neither type nor token: %v", err)
	}
}

func TestAKeyThatCannotBeReadBackIsRemoved(t *testing.T) {
	for _, typ := range []hsmkey.KeyType{hsmkey.P256, hsmkey.HMAC256} {
		for _, code := range []uint{pkcs11.CKR_ARGUMENTS_BAD, pkcs11.CKR_DEVICE_ERROR} {
			injector := fault.New()
			h := wrapped(t, func(m sessionpool.Module) sessionpool.Module {
				return afterwards{odd{injector.Wrap(m)}, injector, code}
			})
			_, err := h.Generate(context.Background(), "key", typ, nil)
			if !errors.Is(err, pkcs11.Error(code)) {
				t.Errorf("Generate = %v, want %v", err, pkcs11.Error(code))
			}
			injector.Clear()
			if n := objects(t, h); n != 0 {
				t.Errorf("%s, %v: %d objects are left", typ, pkcs11.Error(code), n)
			}
			if err := h.Close(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// afterwards makes what is read after a generation fail.
type afterwards struct {
	odd
	injector *fault.Injector
	code     uint
}

func (o afterwards) GenerateKeyPair(h pkcs11.SessionHandle, m []*pkcs11.Mechanism, public, private []*pkcs11.Attribute) (pkcs11.ObjectHandle, pkcs11.ObjectHandle, error) {
	o.injector.FailAll("C_GetAttributeValue", o.code)
	return o.Module.GenerateKeyPair(h, m, public, private)
}

func (o afterwards) GenerateKey(h pkcs11.SessionHandle, m []*pkcs11.Mechanism, template []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	o.injector.FailAll("C_GetAttributeValue", o.code)
	return o.Module.GenerateKey(h, m, template)
}

func TestAKeyWhoseSessionDiesIsRemovedThroughAnother(t *testing.T) {
	injector := fault.New()
	c := config(testhsm.New(t))
	c.Pool.Wrap = func(m sessionpool.Module) sessionpool.Module { return dies{odd{injector.Wrap(m)}, injector} }
	c.Pool.MaxSessions = 1 // the dead one must make room
	h := open(t, c)
	for _, typ := range []hsmkey.KeyType{hsmkey.P256, hsmkey.HMAC256} {
		_, err := h.Generate(context.Background(), "key", typ, nil)
		if !errors.Is(err, hsmkey.ErrSession) {
			t.Errorf("Generate = %v, want ErrSession", err)
		}
		if n := objects(t, h); n != 0 {
			t.Errorf("%s: %d objects are left", typ, n)
		}
	}
}

func TestWhatCannotBeRemovedInItsSessionIsRemovedThroughAnother(t *testing.T) {
	injector := fault.New()
	h := wrapped(t, injector.Wrap)
	for _, code := range []uint{pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_FUNCTION_NOT_SUPPORTED} {
		injector.Fail("C_CreateObject", 2, pkcs11.CKR_TOKEN_WRITE_PROTECTED)
		injector.Fail("C_DestroyObject", 1, code)
		_, err := h.Import(context.Background(), "key", newKeys(t)[hsmkey.P256], nil)
		if !errors.Is(err, pkcs11.Error(pkcs11.CKR_TOKEN_WRITE_PROTECTED)) {
			t.Errorf("Import = %v, want the first code", err)
		}
		injector.Clear()
		if n := objects(t, h); n != 0 {
			t.Errorf("%v: %d objects are left", pkcs11.Error(code), n)
		}
	}
}

// dies loses the session right after a generation.
type dies struct {
	odd
	injector *fault.Injector
}

func (o dies) GenerateKeyPair(h pkcs11.SessionHandle, m []*pkcs11.Mechanism, public, private []*pkcs11.Attribute) (pkcs11.ObjectHandle, pkcs11.ObjectHandle, error) {
	pub, priv, err := o.Module.GenerateKeyPair(h, m, public, private)
	o.injector.CloseSessions()
	return pub, priv, err
}

func (o dies) GenerateKey(h pkcs11.SessionHandle, m []*pkcs11.Mechanism, template []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	key, err := o.Module.GenerateKey(h, m, template)
	o.injector.CloseSessions()
	return key, err
}

func TestAKeyThatIsReadyAfterEverybodyLeftIsRemoved(t *testing.T) {
	injector := fault.New()
	c := config(testhsm.New(t))
	c.Pool.Wrap = injector.Wrap
	h := open(t, c)
	objects(t, h)
	reached, release := injector.Hang("C_GenerateKeyPair")
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() {
		_, err := h.Generate(ctx, "key", hsmkey.P256, nil)
		ended <- err
	}()
	<-reached
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("Generate = %v, want context.Canceled", err)
	}
	destroyed := injector.Calls("C_DestroyObject")
	release()
	for injector.Calls("C_DestroyObject") < destroyed+2 {
		runtime.Gosched()
	}
	if err := h.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	if n := objects(t, open(t, c)); n != 0 {
		t.Errorf("%d objects are left", n)
	}
}

func TestTwoGenerationsOfOneLabelAtOnceMakeOneKey(t *testing.T) {
	h := newHSM(t)
	outcomes := make(chan error)
	const racers = 8
	for range racers {
		go func() {
			_, err := h.Generate(context.Background(), "key", hsmkey.P256, nil)
			outcomes <- err
		}()
	}
	made := 0
	for range racers {
		if err := <-outcomes; err == nil {
			made++
		} else if !errors.Is(err, hsmkey.ErrExists) {
			t.Errorf("Generate = %v, want ErrExists", err)
		}
	}
	if made != 1 {
		t.Errorf("%d keys were made", made)
	}
	mustFind(t, h, hsmkey.Query{Label: "key"})
}

// rival is a module on which somebody else makes a key while one is made.
type rival struct {
	odd
	meanwhile func(sessionpool.Module, pkcs11.SessionHandle)
}

func (o rival) GenerateKeyPair(h pkcs11.SessionHandle, m []*pkcs11.Mechanism, public, private []*pkcs11.Attribute) (pkcs11.ObjectHandle, pkcs11.ObjectHandle, error) {
	o.meanwhile(o.Module, h)
	return o.Module.GenerateKeyPair(h, m, public, private)
}

func (o rival) GenerateKey(h pkcs11.SessionHandle, m []*pkcs11.Mechanism, template []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	o.meanwhile(o.Module, h)
	return o.Module.GenerateKey(h, m, template)
}

func (o rival) CreateObject(h pkcs11.SessionHandle, template []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	o.meanwhile(o.Module, h)
	return o.Module.CreateObject(h, template)
}

func TestAKeyIsRemovedAgainIfSomebodyElseMadeOneOfItsNameMeanwhile(t *testing.T) {
	ctx, secret := context.Background(), bytes.Repeat([]byte{1}, 32)
	id := []byte{1, 2, 3}
	makers := map[string]func(*hsmkey.HSM) error{
		"generating a pair": func(h *hsmkey.HSM) error {
			_, err := h.Generate(ctx, "key", hsmkey.P256, id)
			return err
		},
		"generating a secret": func(h *hsmkey.HSM) error {
			_, err := h.Generate(ctx, "key", hsmkey.HMAC256, id)
			return err
		},
		"importing a pair": func(h *hsmkey.HSM) error {
			_, err := h.Import(ctx, "key", newKeys(t)[hsmkey.P256], id)
			return err
		},
		"importing a secret": func(h *hsmkey.HSM) error {
			_, err := h.Import(ctx, "key", secret, id)
			return err
		},
	}
	rivals := map[string]hsmkey.Query{
		"the same label":        {Label: "key", ID: []byte{9}},
		"the same id":           {Label: "other", ID: id},
		"the same label and id": {Label: "key", ID: id},
	}
	for what, attempt := range makers {
		for name, query := range rivals {
			t.Run(what+" with "+name, func(t *testing.T) {
				var once sync.Once
				h := wrapped(t, func(m sessionpool.Module) sessionpool.Module {
					return rival{odd{m}, func(m sessionpool.Module, session pkcs11.SessionHandle) {
						once.Do(func() {
							if _, err := m.CreateObject(session, []*pkcs11.Attribute{
								pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
								pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET),
								pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
								pkcs11.NewAttribute(pkcs11.CKA_SIGN, true),
								pkcs11.NewAttribute(pkcs11.CKA_LABEL, query.Label),
								pkcs11.NewAttribute(pkcs11.CKA_ID, query.ID),
								pkcs11.NewAttribute(pkcs11.CKA_VALUE, bytes.Repeat([]byte{2}, 32)),
							}); err != nil {
								t.Error(err)
							}
						})
					}}
				})
				if err := attempt(h); !errors.Is(err, hsmkey.ErrExists) || errors.Is(err, hsmkey.ErrSession) {
					t.Errorf("%v, want ErrExists", err)
				}
				if n := objects(t, h); n != 1 {
					t.Errorf("%d objects are left, want the other key", n)
				}
				mustFind(t, h, query)
				if err := h.Delete(ctx, query); err != nil {
					t.Fatal(err)
				}
				if err := attempt(h); err != nil {
					t.Errorf("now that the name is free: %v", err)
				}
			})
		}
	}
}

func TestAnEmptyIDIsReplacedByARandomOne(t *testing.T) {
	h := newHSM(t)
	ids := map[string]bool{}
	for _, label := range []string{"a", "b", "c"} {
		key, err := h.Generate(context.Background(), label, hsmkey.P256, []byte{})
		if err != nil {
			t.Fatal(err)
		}
		ids[string(key.ID())] = true
		if len(key.ID()) != 16 {
			t.Errorf("id %x, want 16 bytes", key.ID())
		}
	}
	if len(ids) != 3 {
		t.Errorf("%d different ids, want 3", len(ids))
	}
}
