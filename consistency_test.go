package hsmkey_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// fleet hands out sessions on its tokens in turn.
type fleet struct {
	mu    sync.Mutex
	next  int
	pools []sessionpool.Source
}

func (f *fleet) Acquire(ctx context.Context, opts ...sessionpool.Option) (*sessionpool.Session, error) {
	f.mu.Lock()
	first := f.next
	f.next++
	f.mu.Unlock()
	var all error
	for i := range f.pools {
		s, err := f.pools[(first+i)%len(f.pools)].Acquire(ctx, opts...)
		if err == nil {
			return s, nil
		}
		all = errors.Join(all, err)
	}
	return nil, all
}

// newFleet opens two tokens, and hands out sessions on both.
func newFleet(tb testing.TB) (*fleet, [2]*hsmkey.HSM) {
	tb.Helper()
	test := testhsm.New(tb, "east", "west")
	var hsms [2]*hsmkey.HSM
	f := &fleet{}
	for i, label := range test.Labels {
		c := config(test)
		c.Pool.TokenLabel = label
		hsms[i] = open(tb, c)
		f.pools = append(f.pools, hsms[i].Source())
	}
	return f, hsms
}

func TestOneKeyOnTwoTokensSignsOnBoth(t *testing.T) {
	f, hsms := newFleet(t)
	ctx := context.Background()
	for typ, private := range newKeys(t) {
		// Each token has its own id for it.
		for _, h := range hsms {
			if _, err := h.Import(ctx, string(typ), private, nil); err != nil {
				t.Fatal(err)
			}
		}
		key, err := hsmkey.FromHSM(ctx, f, hsmkey.Query{Label: string(typ)})
		if err != nil {
			t.Fatal(err)
		}
		for range 4 {
			signOnce(t, key)
		}
	}
	for _, h := range hsms {
		if _, err := h.Import(ctx, "secret", make([]byte, 32), nil); err != nil {
			t.Fatal(err)
		}
	}
	secret, err := hsmkey.FromHSM(ctx, f, hsmkey.Query{Label: "secret"})
	if err != nil {
		t.Fatal(err)
	}
	for range 4 {
		signOnce(t, secret)
	}
}

func TestATokenWithAnotherKeyOfTheSameNameIsLeftOut(t *testing.T) {
	f, hsms := newFleet(t)
	east, west := f.pools[0], f.pools[1]
	for _, typ := range []hsmkey.KeyType{hsmkey.RSA2048, hsmkey.P256, hsmkey.Ed25519, hsmkey.HMAC256} {
		right := generate(t, hsms[0], string(typ), typ)
		generate(t, hsms[1], string(typ), typ)

		f.pools = []sessionpool.Source{east}
		key, err := hsmkey.FromHSM(context.Background(), f, hsmkey.Query{Label: string(typ)})
		if err != nil {
			t.Fatal(err)
		}
		f.pools = []sessionpool.Source{east, west}
		for range 6 {
			signature, err := key.SignJWS(context.Background(), key.Algorithms()[0], []byte("a.b"))
			if err != nil {
				t.Fatal(err)
			}
			if err := verify(right, key.Algorithms()[0], []byte("a.b"), signature); err != nil {
				t.Errorf("%s: %v", typ, err)
			}
		}
		f.pools = []sessionpool.Source{west}
		_, err = key.SignJWS(context.Background(), key.Algorithms()[0], []byte("a.b"))
		if !errors.Is(err, hsmkey.ErrKeyMismatch) || !strings.Contains(err.Error(), "west") {
			t.Errorf("%s on the wrong token: %v, want ErrKeyMismatch that names it", typ, err)
		}
	}
}

func TestATokenThatCannotSignByTheAlgorithmIsLeftOut(t *testing.T) {
	test := testhsm.New(t, "east", "west")
	var refused atomic.Int32
	f := &fleet{}
	private := newKeys(t)[hsmkey.Ed25519]
	for i, label := range test.Labels {
		c := config(test)
		c.Pool.TokenLabel, c.Pool.Private = label, true // a decorator of its own
		if i == 0 {
			c.Pool.Wrap = func(m sessionpool.Module) sessionpool.Module {
				return lacks{odd: odd{m}, mechanisms: []uint{0x1057}, code: pkcs11.CKR_MECHANISM_INVALID, refused: &refused}
			}
		}
		testhsm.Import(t, &testhsm.HSM{Module: test.Module, Conf: test.Conf, Dir: test.Dir, Labels: []string{label}}, private, "key", "01")
		f.pools = append(f.pools, open(t, c).Source())
	}
	key, err := hsmkey.FromHSM(context.Background(), f, hsmkey.Query{Label: "key"})
	if err != nil {
		t.Fatal(err)
	}
	for range 4 {
		signOnce(t, key)
	}
	if refused.Load() == 0 {
		t.Error("the test did not refuse anything")
	}
	f.pools = f.pools[:1]
	if _, err := key.SignJWS(context.Background(), hsmkey.EdDSA, nil); !errors.Is(err, hsmkey.ErrUnsupported) || !strings.Contains(err.Error(), "CKM_EDDSA") || !strings.Contains(err.Error(), "east") {
		t.Errorf("SignJWS = %v, want ErrUnsupported that names mechanism and token", err)
	}
}

func TestATokenWithAKeyOfAnotherKindIsLeftOut(t *testing.T) {
	test := testhsm.New(t, "east", "west")
	testhsm.GenerateEC(t, test, "key", "01")
	testhsm.PKCS11Tool(t, test, "--token-label", "west", "--keypairgen", "--key-type", "EC:secp256k1", "--label", "key", "--id", "01")
	f := &fleet{}
	for _, label := range test.Labels {
		c := config(test)
		c.Pool.TokenLabel = label
		f.pools = append(f.pools, open(t, c).Source())
	}
	for range 4 {
		key, err := hsmkey.FromHSM(context.Background(), f, hsmkey.Query{Label: "key"})
		if err != nil {
			t.Fatal(err)
		}
		for range 4 {
			signOnce(t, key)
		}
	}
}

func TestATokenWithoutTheKeyIsLeftOut(t *testing.T) {
	f, hsms := newFleet(t)
	generate(t, hsms[1], "key", hsmkey.P256)
	for range 4 {
		key, err := hsmkey.FromHSM(context.Background(), f, hsmkey.Query{Label: "key"})
		if err != nil {
			t.Fatal(err)
		}
		signOnce(t, key)
	}
	if _, err := hsmkey.FromHSM(context.Background(), f, hsmkey.Query{Label: "nowhere"}); !errors.Is(err, hsmkey.ErrKeyNotFound) || errors.Is(err, hsmkey.ErrSession) {
		t.Errorf("FromHSM = %v, want ErrKeyNotFound", err)
	}
}
