package sessionpool_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"math/big"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"go.uber.org/goleak"

	"github.com/hsmkey/hsmkey/internal/fault"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// hsm is a token with a signing key behind the fault injector.
type hsm struct {
	*testhsm.HSM
	fault  *fault.Injector
	events *recorder
	cfg    sessionpool.Config
}

// newHSM makes a token and the configuration of pools on it.
func newHSM(tb testing.TB) *hsm {
	tb.Helper()
	h := &hsm{HSM: testhsm.New(tb), fault: fault.New(), events: newRecorder()}
	h.cfg = sessionpool.Config{
		Module: h.Module, TokenLabel: h.Labels[0], PIN: sessionpool.StaticPIN(testhsm.PIN),
		Wrap: h.fault.Wrap, OnEvent: h.events.record,
	}
	return h
}

// pool opens a pool that is closed, in order, when the test ends.
func (h *hsm) pool(tb testing.TB, change ...func(*sessionpool.Config)) *sessionpool.Pool {
	tb.Helper()
	cfg := h.cfg
	for _, c := range change {
		c(&cfg)
	}
	p, err := sessionpool.New(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { closePool(tb, p) })
	return p
}

func closePool(tb testing.TB, p *sessionpool.Pool) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := p.Close(ctx); err != nil {
		tb.Errorf("closing the pool: %v", err)
	}
}

func acquire(tb testing.TB, src sessionpool.Source, opts ...sessionpool.Option) *sessionpool.Session {
	tb.Helper()
	s, err := src.Acquire(context.Background(), opts...)
	if err != nil {
		tb.Fatalf("acquiring a session: %v", err)
	}
	return s
}

// handle is the physical session's handle.
func handle(tb testing.TB, s *sessionpool.Session) pkcs11.SessionHandle {
	tb.Helper()
	var got pkcs11.SessionHandle
	if err := s.Do(context.Background(), func(_ sessionpool.Module, h pkcs11.SessionHandle) error {
		got = h
		return nil
	}); err != nil {
		tb.Fatalf("using a session: %v", err)
	}
	return got
}

// ping is a cheap call on a session.
func ping(s *sessionpool.Session) error {
	return s.Do(context.Background(), func(m sessionpool.Module, h pkcs11.SessionHandle) error {
		_, err := m.GetSessionInfo(h)
		return err
	})
}

var oidP256 = []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}

// makeKey generates an EC key pair on the token.
func makeKey(tb testing.TB, src sessionpool.Source, label string) *ecdsa.PublicKey {
	tb.Helper()
	s := acquire(tb, src, sessionpool.ReadWrite())
	defer s.Close()
	pub, err := generate(s, label)
	if err != nil {
		tb.Fatalf("generating a key: %v", err)
	}
	return pub
}

func generate(s *sessionpool.Session, label string) (*ecdsa.PublicKey, error) {
	var pub *ecdsa.PublicKey
	err := s.Do(context.Background(), func(m sessionpool.Module, h pkcs11.SessionHandle) error {
		public, _, err := m.GenerateKeyPair(h,
			[]*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
			[]*pkcs11.Attribute{
				pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
				pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, oidP256), pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true),
			},
			[]*pkcs11.Attribute{
				pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
				pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true), pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
				pkcs11.NewAttribute(pkcs11.CKA_SIGN, true),
			})
		if err != nil {
			return err
		}
		a, err := m.GetAttributeValue(h, public, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, nil)})
		if err != nil {
			return err
		}
		var point []byte
		if _, err := asn1.Unmarshal(a[0].Value, &point); err != nil {
			return err
		}
		pub, err = ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
		return err
	})
	return pub, err
}

// findKey is the handle of a private key.
func findKey(m sessionpool.Module, h pkcs11.SessionHandle, label string) (pkcs11.ObjectHandle, error) {
	if err := m.FindObjectsInit(h, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
	}); err != nil {
		return 0, err
	}
	found, _, err := m.FindObjects(h, 2)
	if err := errors.Join(err, m.FindObjectsFinal(h)); err != nil {
		return 0, err
	}
	if len(found) != 1 {
		return 0, errors.New("the key was not found")
	}
	return found[0], nil
}

var ecdsaMechanism = pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)

// sign signs a digest through a session, as a user of the package would.
func sign(ctx context.Context, s *sessionpool.Session, label string, digest []byte) ([]byte, error) {
	var sig []byte
	err := s.Do(ctx, func(m sessionpool.Module, h pkcs11.SessionHandle) error {
		v, err := s.Memo(label, func() (any, error) { return findKey(m, h, label) })
		if err != nil {
			return err
		}
		key, _ := v.(pkcs11.ObjectHandle)
		sig, err = m.SignSingle(nil, h, ecdsaMechanism, key, digest, 64)
		return err
	})
	if err != nil {
		return nil, err
	}
	return sig, nil
}

func verifies(pub *ecdsa.PublicKey, digest, sig []byte) bool {
	return len(sig) == 64 && ecdsa.Verify(pub, digest, new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:]))
}

// mustSign signs something and checks the signature.
func mustSign(tb testing.TB, s *sessionpool.Session, pub *ecdsa.PublicKey, label string) {
	tb.Helper()
	digest := sha256.Sum256([]byte(tb.Name()))
	sig, err := sign(context.Background(), s, label, digest[:])
	if err != nil {
		tb.Fatalf("signing: %v", err)
	}
	if !verifies(pub, digest[:], sig) {
		tb.Fatal("the signature does not verify")
	}
}

// recorder keeps events, and lets a test wait for one.
type recorder struct {
	mu     sync.Mutex
	events []sessionpool.Event
	more   chan struct{}
}

func newRecorder() *recorder { return &recorder{more: make(chan struct{})} }

func (r *recorder) record(e sessionpool.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
	close(r.more)
	r.more = make(chan struct{})
}

func (r *recorder) count(match func(sessionpool.Event) bool) (n int, more <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.events {
		if match(e) {
			n++
		}
	}
	return n, r.more
}

// wait waits until n events match.
func (r *recorder) wait(tb testing.TB, n int, match func(sessionpool.Event) bool) {
	tb.Helper()
	deadline := time.After(30 * time.Second)
	for {
		got, more := r.count(match)
		if got >= n {
			return
		}
		select {
		case <-more:
		case <-deadline:
			tb.Fatalf("%d of %d events came", got, n)
		}
	}
}

func ofKind(k sessionpool.EventKind) func(sessionpool.Event) bool {
	return func(e sessionpool.Event) bool { return e.Kind == k }
}

func closedBy(c sessionpool.CloseCause) func(sessionpool.Event) bool {
	return func(e sessionpool.Event) bool { return e.Kind == sessionpool.SessionClosed && e.Cause == c }
}

// until waits until a condition holds that no event tells of.
func until(tb testing.TB, what string, holds func() bool) {
	tb.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	deadline := time.After(30 * time.Second)
	for !holds() {
		select {
		case <-tick.C:
		case <-deadline:
			tb.Fatalf("it never came true that %s", what)
		}
	}
}
