package jws_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/fault"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/jws"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// numbered yields n claims, each of which says its place.
func numbered(n int) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		var buf []byte // one for all, as readers of files do
		for i := range n {
			buf = fmt.Appendf(buf[:0], `{"n":%d}`, i)
			if !yield(buf) {
				return
			}
		}
	}
}

// faultyHSM opens a token behind a fault injector.
func faultyHSM(tb testing.TB, change ...func(*sessionpool.Config)) (*hsmkey.HSM, *fault.Injector) {
	tb.Helper()
	injector := fault.New()
	token := testhsm.New(tb)
	cfg := sessionpool.Config{
		Module: token.Module, TokenLabel: token.Labels[0], PIN: sessionpool.StaticPIN(testhsm.PIN), Wrap: injector.Wrap,
	}
	for _, c := range change {
		c(&cfg)
	}
	hsm, err := hsmkey.Open(context.Background(), hsmkey.Config{Pool: cfg})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := hsm.Close(context.Background()); err != nil {
			tb.Errorf("close the HSM: %v", err)
		}
	})
	return hsm, injector
}

// checkBatch verifies that tokens are those of numbered(len(tokens)).
func checkBatch(t *testing.T, key *hsmkey.HSMJWK, alg hsmkey.Algorithm, tokens []string) {
	t.Helper()
	verifier, err := jws.NewKeyVerifier(key, jws.VerifierOptions{Algorithms: []hsmkey.Algorithm{alg}})
	if err != nil {
		t.Fatal(err)
	}
	for i, token := range tokens {
		got, err := verifier.Verify(context.Background(), token)
		if err != nil {
			t.Fatalf("token %d: %v", i, err)
		}
		if want := fmt.Sprintf(`{"n":%d}`, i); string(got.Payload) != want {
			t.Fatalf("token %d holds %s, want %s", i, got.Payload, want)
		}
	}
}

func TestABatchComesInTheOrderOfItsInput(t *testing.T) {
	hsm := openHSM(t)
	key := generate(t, hsm, hsmkey.P256)
	signer := newSigner(t, key, jws.Options{Type: "JWT"})
	for _, sessions := range []int{0, 1, 2, 8} {
		var tokens []string
		for token, err := range signer.Batch(context.Background(), numbered(500), jws.BatchOptions{Sessions: sessions}) {
			if err != nil {
				t.Fatal(err)
			}
			tokens = append(tokens, token)
		}
		if len(tokens) != 500 {
			t.Fatalf("with %d sessions: %d tokens, want 500", sessions, len(tokens))
		}
		checkBatch(t, key, hsmkey.ES256, tokens)
	}
}

func TestABatchIsByteForByteWhatGoJoseWrites(t *testing.T) {
	hsm := openHSM(t)
	for alg, typ := range map[hsmkey.Algorithm]hsmkey.KeyType{
		hsmkey.RS256: hsmkey.RSA2048, hsmkey.EdDSA: hsmkey.Ed25519, hsmkey.HS256: hsmkey.HMAC256,
	} {
		signer := newSigner(t, generate(t, hsm, typ), jws.Options{Algorithm: alg, Type: "JWT", Header: map[string]any{"x": []int{1}}})
		i := 0
		for token, err := range signer.Batch(context.Background(), numbered(20), jws.BatchOptions{Sessions: 2}) {
			if err != nil {
				t.Fatal(err)
			}
			object, err := signer.Jose().Sign(fmt.Appendf(nil, `{"n":%d}`, i))
			if err != nil {
				t.Fatal(err)
			}
			want, err := object.CompactSerialize()
			if err != nil {
				t.Fatal(err)
			}
			if token != want {
				t.Errorf("%s: token %d is\n%s, want\n%s", alg, i, token, want)
			}
			i++
		}
	}
}

var errOdd = errors.New("odd")

// refuseSevens fails each item whose number ends in 7.
func refuseSevens(i int, item []byte) ([]byte, error) {
	if i%10 == 7 {
		return nil, errOdd
	}
	return item, nil
}

func TestAnItemsErrorEndsTheBatchAfterTheTokensBeforeIt(t *testing.T) {
	hsm := openHSM(t)
	signer := newSigner(t, generate(t, hsm, hsmkey.P256), jws.Options{})
	var tokens int
	var failed []error
	for _, err := range signer.Batch(context.Background(), numbered(100), jws.BatchOptions{Sessions: 4, Prepare: refuseSevens}) {
		if err != nil {
			failed = append(failed, err)
		} else {
			tokens++
		}
	}
	var item *jws.ItemError
	if tokens != 7 || len(failed) != 1 || !errors.As(failed[0], &item) || item.Index != 7 || !errors.Is(item, errOdd) {
		t.Errorf("%d tokens and errors %v, want 7 and the error of item 7", tokens, failed)
	}
}

func TestSkippedItemsAreReportedInTheirPlace(t *testing.T) {
	hsm := openHSM(t)
	signer := newSigner(t, generate(t, hsm, hsmkey.P256), jws.Options{})
	at := 0
	for token, err := range signer.Batch(context.Background(), numbered(100), jws.BatchOptions{Sessions: 4, Skip: true, Prepare: refuseSevens}) {
		var item *jws.ItemError
		switch {
		case at%10 == 7 && (!errors.As(err, &item) || item.Index != at || token != ""):
			t.Errorf("item %d: token %q and error %v, want its error", at, token, err)
		case at%10 != 7 && err != nil:
			t.Errorf("item %d: %v", at, err)
		}
		at++
	}
	if at != 100 {
		t.Errorf("%d elements, want 100", at)
	}
}

func TestABatchEndsAsItsInputDoes(t *testing.T) {
	hsm := openHSM(t)
	signer := newSigner(t, generate(t, hsm, hsmkey.P256), jws.Options{})
	run := func(end func()) (recovered any, returned bool) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			defer func() { recovered = recover() }()
			input := func(yield func([]byte) bool) {
				yield([]byte("{}"))
				end()
			}
			for _, err := range signer.Batch(context.Background(), input, jws.BatchOptions{}) {
				if err != nil {
					t.Error(err)
				}
			}
			returned = true
		}()
		<-done
		return recovered, returned
	}
	if recovered, returned := run(func() { panic("odd") }); recovered != "odd" || returned {
		t.Errorf("an input that panics: recovered %v, returned %v", recovered, returned)
	}
	if recovered, returned := run(runtime.Goexit); recovered != nil || returned {
		t.Errorf("an input that leaves its goroutine: recovered %v, returned %v", recovered, returned)
	}
}

func TestAnInterruptedBatchSaysWhy(t *testing.T) {
	hsm := openHSM(t)
	signer := newSigner(t, generate(t, hsm, hsmkey.P256), jws.Options{})
	why := errors.New("the shop is closed")
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	var last error
	for _, err := range signer.Batch(ctx, numbered(1<<20), jws.BatchOptions{}) {
		cancel(why)
		last = err
	}
	if !errors.Is(last, why) || !errors.Is(last, context.Canceled) {
		t.Errorf("the last error is %v, want the cause and context.Canceled", last)
	}
}

func TestABatchSurvivesSessionsThatFail(t *testing.T) {
	hsm, injector := faultyHSM(t)
	key := generate(t, hsm, hsmkey.P256)
	signer := newSigner(t, key, jws.Options{})
	injector.Random(1, 0.02, map[string][]uint{"C_Sign": {
		pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_USER_NOT_LOGGED_IN, pkcs11.CKR_KEY_HANDLE_INVALID,
		pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_GENERAL_ERROR,
	}})
	var tokens []string
	for token, err := range signer.Batch(context.Background(), numbered(3000), jws.BatchOptions{Sessions: 4}) {
		if err != nil {
			t.Fatal(err)
		}
		if len(tokens)%1000 == 500 {
			injector.CloseSessions()
		}
		tokens = append(tokens, token)
	}
	if len(tokens) != 3000 {
		t.Fatalf("%d tokens, want 3000", len(tokens))
	}
	injector.Clear()
	checkBatch(t, key, hsmkey.ES256, tokens)
}

func TestABatchSurvivesACallThatHangs(t *testing.T) {
	hsm, injector := faultyHSM(t, func(c *sessionpool.Config) { c.OpTimeout = 200 * time.Millisecond })
	key := generate(t, hsm, hsmkey.P256)
	signer := newSigner(t, key, jws.Options{})
	_, release := injector.Hang("C_Sign")
	defer release()
	var tokens []string
	for token, err := range signer.Batch(context.Background(), numbered(200), jws.BatchOptions{Sessions: 2}) {
		if err != nil {
			t.Fatal(err)
		}
		tokens = append(tokens, token)
	}
	checkBatch(t, key, hsmkey.ES256, tokens)
	if len(tokens) != 200 {
		t.Errorf("%d tokens, want 200", len(tokens))
	}
}

func TestAnHSMThatIsGoneEndsTheBatchEvenWhenItemsAreSkipped(t *testing.T) {
	hsm, injector := faultyHSM(t)
	signer := newSigner(t, generate(t, hsm, hsmkey.P256), jws.Options{})
	injector.FailAll("C_Sign", pkcs11.CKR_DEVICE_ERROR)
	count := 0
	var last error
	for _, err := range signer.Batch(context.Background(), numbered(1000), jws.BatchOptions{Sessions: 2, Skip: true}) {
		count++
		last = err
	}
	if count != 1 || !errors.Is(last, hsmkey.ErrSession) {
		t.Errorf("%d elements, the last %v, want one with ErrSession", count, last)
	}
}

func TestABatchEndsAtOnceWithItsContext(t *testing.T) {
	hsm, injector := faultyHSM(t)
	signer := newSigner(t, generate(t, hsm, hsmkey.P256), jws.Options{})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	reached, release := injector.Hang("C_Sign")
	defer release()
	go func() {
		<-reached
		cancel()
	}()
	var last error
	for _, err := range signer.Batch(ctx, numbered(1000000), jws.BatchOptions{Sessions: 1}) {
		last = err
	}
	if !errors.Is(last, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", last)
	}
}

func TestWhoLeavesABatchLeavesNothingBehind(t *testing.T) {
	hsm := openHSM(t)
	signer := newSigner(t, generate(t, hsm, hsmkey.P256), jws.Options{})
	ended := false
	endless := func(yield func([]byte) bool) {
		defer func() { ended = true }()
		for yield([]byte(`{}`)) {
		}
	}
	got := 0
	for _, err := range signer.Batch(context.Background(), endless, jws.BatchOptions{Sessions: 3}) {
		if err != nil {
			t.Fatal(err)
		}
		if got++; got == 10 {
			break
		}
	}
	if !ended {
		t.Error("the input still runs")
	}
}

func TestASlowReaderSlowsTheInputDown(t *testing.T) {
	hsm := openHSM(t)
	signer := newSigner(t, generate(t, hsm, hsmkey.P256), jws.Options{})
	var mu sync.Mutex
	read := 0
	counting := func(yield func([]byte) bool) {
		for item := range numbered(100000) {
			mu.Lock()
			read++
			mu.Unlock()
			if !yield(item) {
				return
			}
		}
	}
	for _, err := range signer.Batch(context.Background(), counting, jws.BatchOptions{Sessions: 2}) {
		if err != nil {
			t.Error(err)
		}
		break
	}
	if read > 5000 {
		t.Errorf("%d items were read for a reader of one", read)
	}
}

func TestImpossibleNumbersOfSessionsAreRefused(t *testing.T) {
	hsm := openHSM(t)
	signer := newSigner(t, generate(t, hsm, hsmkey.P256), jws.Options{})
	for _, sessions := range []int{-1, jws.MaxBatchSessions + 1} {
		for _, err := range signer.Batch(context.Background(), numbered(1), jws.BatchOptions{Sessions: sessions}) {
			if !errors.Is(err, hsmkey.ErrConfig) {
				t.Errorf("%d sessions: %v, want ErrConfig", sessions, err)
			}
		}
	}
}

func TestAnEmptyBatchIsEmpty(t *testing.T) {
	hsm := openHSM(t)
	signer := newSigner(t, generate(t, hsm, hsmkey.P256), jws.Options{})
	for token, err := range signer.Batch(context.Background(), slices.Values[[][]byte](nil), jws.BatchOptions{}) {
		t.Errorf("got %q and %v", token, err)
	}
}

func TestLargeItemsShareTheWindow(t *testing.T) {
	hsm := openHSM(t)
	signer := newSigner(t, generate(t, hsm, hsmkey.P256), jws.Options{})
	large := []byte(`{"x":"` + strings.Repeat("x", 3<<20) + `"}`)
	got := 0
	for token, err := range signer.Batch(context.Background(), slices.Values([][]byte{large, large, large, large, large}), jws.BatchOptions{Sessions: 2}) {
		if err != nil || len(token) < 4<<20 {
			t.Errorf("a token of %d bytes, error %v", len(token), err)
		}
		got++
	}
	if got != 5 {
		t.Errorf("%d tokens, want 5", got)
	}
}

func TestAForeignSignersBatchIsSignedToo(t *testing.T) {
	hsm := openHSM(t)
	key := generate(t, hsm, hsmkey.P256)
	signer, err := jws.FromSigner(struct{ *hsmkey.HSMJWK }{key}, jws.Options{})
	if err != nil {
		t.Fatal(err)
	}
	var tokens []string
	for token, err := range signer.Batch(context.Background(), numbered(50), jws.BatchOptions{Sessions: 2}) {
		if err != nil {
			t.Fatal(err)
		}
		tokens = append(tokens, token)
	}
	checkBatch(t, key, hsmkey.ES256, tokens)
}
