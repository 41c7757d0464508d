package hsmkey_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/fault"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// listed is a balance list over tokens of one SoftHSM2.
type listed struct {
	fleet *hsmkey.HSM
	each  []*hsmkey.HSM // the same tokens one by one
	path  string
	list  []string // lines
}

// newListed opens tokens by a balance list, and one by one.
func newListed(t *testing.T, labels ...string) *listed {
	t.Helper()
	test := testhsm.New(t, labels...)
	l := &listed{path: filepath.Join(t.TempDir(), "active.list")}
	for _, label := range labels {
		c := config(test)
		c.Pool.TokenLabel = label
		l.each = append(l.each, open(t, c))
		l.list = append(l.list, "pkcs11:token="+label+"?module-path="+test.Module)
	}
	l.open(t, test, l.list...)
	return l
}

// open opens a list of these lines.
func (l *listed) open(t *testing.T, test *testhsm.HSM, lines ...string) {
	t.Helper()
	if err := os.WriteFile(l.path, []byte(strings.Join(lines, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	c := config(test)
	c.Balance.Lists = l.path
	l.fleet = open(t, c)
}

func outcomes(results []hsmkey.EndpointResult) []hsmkey.Outcome {
	var list []hsmkey.Outcome
	for _, r := range results {
		list = append(list, r.Outcome)
	}
	return list
}

func wantOutcomes(t *testing.T, results []hsmkey.EndpointResult, want ...hsmkey.Outcome) {
	t.Helper()
	if got := outcomes(results); !slices.Equal(got, want) {
		t.Errorf("outcomes %v, want %v (%v)", got, want, results)
	}
}

func TestAnImportGoesToEveryEndpointAndCanBeMadeAgain(t *testing.T) {
	l := newListed(t, "north", "east", "west")
	ctx := context.Background()
	keys := map[hsmkey.KeyType]any{hsmkey.HMAC256: []byte(strings.Repeat("s", 32)), hsmkey.HMAC512: []byte(strings.Repeat("l", 64))}
	for typ, private := range newKeys(t) {
		keys[typ] = private
	}
	for typ, private := range keys {
		label := string(typ)
		made, results, err := l.fleet.ImportEach(ctx, label, private, nil)
		if err != nil {
			t.Fatal(err)
		}
		wantOutcomes(t, results, hsmkey.Imported, hsmkey.Imported, hsmkey.Imported)
		for i, r := range results {
			if r.Endpoint != l.list[i] || r.List != l.path || r.Err != nil {
				t.Errorf("result %d is %+v", i, r)
			}
		}
		for range 6 {
			signOnce(t, made)
		}
		for _, h := range l.each {
			if got := mustFind(t, h, hsmkey.Query{Label: label}); string(got.ID()) != string(made.ID()) {
				t.Errorf("%s has id %x, want %x everywhere", typ, got.ID(), made.ID())
			}
		}

		// One endpoint loses the key: only there it is made again, under the same id.
		if err := l.each[1].Delete(ctx, hsmkey.Query{Label: label}); err != nil {
			t.Fatal(err)
		}
		again, results, err := l.fleet.ImportEach(ctx, label, private, nil)
		if err != nil {
			t.Fatal(err)
		}
		wantOutcomes(t, results, hsmkey.Present, hsmkey.Imported, hsmkey.Present)
		if string(again.ID()) != string(made.ID()) {
			t.Errorf("made again with id %x, want %x", again.ID(), made.ID())
		}
		for range 6 {
			signOnce(t, again)
		}
	}
}

func TestAnImportTakesTheIDThatTheKeyHasOnAnEndpoint(t *testing.T) {
	l := newListed(t, "north", "east")
	ctx := context.Background()
	private := newKeys(t)[hsmkey.P256]
	if _, err := l.each[1].Import(ctx, "key", private, []byte{7}); err != nil {
		t.Fatal(err)
	}
	made, results, err := l.fleet.ImportEach(ctx, "key", private, nil)
	if err != nil {
		t.Fatal(err)
	}
	wantOutcomes(t, results, hsmkey.Imported, hsmkey.Present)
	if string(made.ID()) != "\x07" {
		t.Errorf("id %x, want 07", made.ID())
	}
	// Who asks for another id is not told that all is well.
	_, results, err = l.fleet.ImportEach(ctx, "key", private, []byte{8})
	wantOutcomes(t, results, hsmkey.Failed, hsmkey.Failed)
	if !errors.Is(err, hsmkey.ErrExists) {
		t.Errorf("error %v, want ErrExists", err)
	}
}

func TestAnImportFailsWhereAnotherKeyHasTheLabel(t *testing.T) {
	l := newListed(t, "north", "east", "west")
	ctx := context.Background()
	short, long := []byte(strings.Repeat("s", 32)), append([]byte(strings.Repeat("s", 32)), 0) // one HMAC, two secrets
	for _, c := range []struct {
		name      string
		key       any
		otherwise func(*hsmkey.HSM) error
	}{
		{"another public key", newKeys(t)[hsmkey.P256], func(h *hsmkey.HSM) error {
			_, err := h.Generate(ctx, "another public key", hsmkey.P256, nil)
			return err
		}},
		{"another type", newKeys(t)[hsmkey.P256], func(h *hsmkey.HSM) error {
			_, err := h.Generate(ctx, "another type", hsmkey.HMAC256, nil)
			return err
		}},
		{"another secret", short, func(h *hsmkey.HSM) error {
			_, err := h.Generate(ctx, "another secret", hsmkey.HMAC256, nil)
			return err
		}},
		{"a secret with a zero more", short, func(h *hsmkey.HSM) error {
			_, err := h.Import(ctx, "a secret with a zero more", long, nil)
			return err
		}},
		{"a key that signs no tokens", short, func(h *hsmkey.HSM) error {
			createSecret(t, h, "a key that signs no tokens", "", pkcs11.CKK_AES, make([]byte, 16))
			return nil
		}},
	} {
		if err := c.otherwise(l.each[1]); err != nil {
			t.Fatal(err)
		}
		made, results, err := l.fleet.ImportEach(ctx, c.name, c.key, nil)
		wantOutcomes(t, results, hsmkey.Imported, hsmkey.Failed, hsmkey.Imported)
		if made != nil || !errors.Is(err, hsmkey.ErrExists) || !strings.Contains(err.Error(), "east") || strings.Contains(err.Error(), "north") {
			t.Errorf("%s: %v, %v, want ErrExists that names the endpoint", c.name, made, err)
		}
		// Again, and nothing changes.
		_, results, _ = l.fleet.ImportEach(ctx, c.name, c.key, nil)
		wantOutcomes(t, results, hsmkey.Present, hsmkey.Failed, hsmkey.Present)
	}
}

func TestTwoEndpointsMayBeOneHSM(t *testing.T) {
	l := newListed(t, "north", "east")
	ctx := context.Background()
	s, err := l.each[0].Source().Acquire(ctx)
	if err != nil {
		t.Fatal(err)
	}
	again := strings.Replace(l.list[0], "token=north", "serial="+s.Token().Info().Serial, 1)
	s.Release()
	test := &testhsm.HSM{Module: testhsm.ModulePath(), Labels: []string{"north"}}
	l.open(t, test, l.list[0], again, l.list[1])
	private := newKeys(t)[hsmkey.P256]
	_, results, err := l.fleet.ImportEach(ctx, "key", private, nil)
	if err != nil {
		t.Fatal(err)
	}
	wantOutcomes(t, results, hsmkey.Imported, hsmkey.Present, hsmkey.Imported)
	results, err = l.fleet.DeleteEach(ctx, hsmkey.Query{Label: "key"})
	if err != nil {
		t.Fatal(err)
	}
	wantOutcomes(t, results, hsmkey.Deleted, hsmkey.Absent, hsmkey.Deleted)
}

func TestAnImportGoesOnAlthoughAnEndpointIsDead(t *testing.T) {
	l := newListed(t, "north", "west")
	ctx := context.Background()
	test := &testhsm.HSM{Module: testhsm.ModulePath(), Labels: []string{"north"}}
	l.open(t, test, l.list[0], "pkcs11:token=east?module-path="+test.Module, l.list[1])
	_, results, err := l.fleet.ImportEach(ctx, "key", newKeys(t)[hsmkey.P256], nil)
	wantOutcomes(t, results, hsmkey.Imported, hsmkey.Failed, hsmkey.Imported)
	if err == nil || !strings.Contains(err.Error(), "failed on 1 of 3 endpoints") || !strings.Contains(err.Error(), "east") {
		t.Errorf("importing: %v", err)
	}
}

// The endpoint that does not answer has another key of that name. A deletion on
// the others would leave that one for the next deletion.
func TestNothingIsDeletedWhileAnEndpointCannotBeAsked(t *testing.T) {
	l := newListed(t, "north", "east", "west")
	ctx := context.Background()
	test := &testhsm.HSM{Module: testhsm.ModulePath(), Labels: []string{"north"}}
	private := newKeys(t)[hsmkey.P256]
	for _, h := range l.each[:2] {
		if _, err := h.Import(ctx, "key", private, []byte{1}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.each[2].Generate(ctx, "key", hsmkey.P256, []byte{2}); err != nil {
		t.Fatal(err)
	}
	before := fmt.Sprint(objects(t, l.each[0]), objects(t, l.each[1]), objects(t, l.each[2]))

	l.open(t, test, l.list[0], l.list[1], "pkcs11:token=dead?module-path="+test.Module)
	results, err := l.fleet.DeleteEach(ctx, hsmkey.Query{Label: "key"})
	wantOutcomes(t, results, hsmkey.Present, hsmkey.Present, hsmkey.Failed)
	if err == nil || !strings.Contains(err.Error(), "nothing was deleted") || !strings.Contains(err.Error(), "token=dead") || strings.Contains(err.Error(), "token=north") {
		t.Errorf("error %v, want that nothing was deleted because of the dead one", err)
	}
	// Not "not found": nobody knows what the dead one has.
	results, err = l.fleet.DeleteEach(ctx, hsmkey.Query{Label: "another"})
	wantOutcomes(t, results, hsmkey.Absent, hsmkey.Absent, hsmkey.Failed)
	if err == nil || errors.Is(err, hsmkey.ErrKeyNotFound) {
		t.Errorf("deleting what the others do not have: %v", err)
	}

	l.open(t, test, l.list...)
	if _, err := l.fleet.DeleteEach(ctx, hsmkey.Query{Label: "key"}); !errors.Is(err, hsmkey.ErrAmbiguous) {
		t.Errorf("when it is back: %v, want ErrAmbiguous", err)
	}
	if after := fmt.Sprint(objects(t, l.each[0]), objects(t, l.each[1]), objects(t, l.each[2])); before != after {
		t.Errorf("%s objects before, %s after", before, after)
	}
}

func TestADeletionThatFailedOnAnEndpointCanBeMadeAgain(t *testing.T) {
	test := testhsm.New(t, "north", "east", "west")
	ctx, injector := context.Background(), fault.New()
	c := config(test)
	c.Pool.Wrap, c.Balance.Lists = injector.Wrap, filepath.Join(t.TempDir(), "active.list")
	var lines string
	for _, label := range test.Labels {
		lines += "pkcs11:token=" + label + "?module-path=" + test.Module + "\n"
	}
	if err := os.WriteFile(c.Balance.Lists, []byte(lines), 0o600); err != nil {
		t.Fatal(err)
	}
	h := open(t, c)
	if _, err := h.Import(ctx, "key", newKeys(t)[hsmkey.P256], nil); err != nil {
		t.Fatal(err)
	}
	injector.Fail("C_DestroyObject", 3, pkcs11.CKR_ACTION_PROHIBITED) // after both halves on the first
	results, err := h.DeleteEach(ctx, hsmkey.Query{Label: "key"})
	wantOutcomes(t, results, hsmkey.Deleted, hsmkey.Failed, hsmkey.Deleted)
	if err == nil || !strings.Contains(err.Error(), "failed on 1 of 3 endpoints") || !strings.Contains(err.Error(), "token=east") {
		t.Errorf("error %v, want the endpoint where it failed", err)
	}
	results, err = h.DeleteEach(ctx, hsmkey.Query{Label: "key"})
	wantOutcomes(t, results, hsmkey.Absent, hsmkey.Deleted, hsmkey.Absent)
	if err != nil {
		t.Errorf("again: %v", err)
	}
}

func TestADeletionGoesToEveryEndpointAndCanBeMadeAgain(t *testing.T) {
	l := newListed(t, "north", "east", "west")
	ctx := context.Background()
	private := newKeys(t)[hsmkey.P256]
	if _, err := l.fleet.Import(ctx, "key", private, nil); err != nil {
		t.Fatal(err)
	}
	if err := l.each[0].Delete(ctx, hsmkey.Query{Label: "key"}); err != nil {
		t.Fatal(err)
	}
	results, err := l.fleet.DeleteEach(ctx, hsmkey.Query{Label: "key"})
	if err != nil {
		t.Fatal(err)
	}
	wantOutcomes(t, results, hsmkey.Absent, hsmkey.Deleted, hsmkey.Deleted)
	for i, h := range l.each {
		if n := objects(t, h); n != 0 {
			t.Errorf("%d objects are left on endpoint %d", n, i)
		}
	}
	results, err = l.fleet.DeleteEach(ctx, hsmkey.Query{Label: "key"})
	wantOutcomes(t, results, hsmkey.Absent, hsmkey.Absent, hsmkey.Absent)
	if !errors.Is(err, hsmkey.ErrKeyNotFound) {
		t.Errorf("deleting a key that nobody has: %v, want ErrKeyNotFound", err)
	}
	for _, h := range l.each {
		createSecret(t, h, "aes", "", pkcs11.CKK_AES, make([]byte, 16))
	}
	if err := l.fleet.Delete(ctx, hsmkey.Query{Label: "aes"}); err != nil {
		t.Errorf("deleting keys that sign no tokens: %v", err)
	}
}

func TestDifferentKeysOfOneNameAreNotDeleted(t *testing.T) {
	l := newListed(t, "north", "east", "west")
	ctx := context.Background()
	private := newKeys(t)[hsmkey.P256]
	for _, i := range []int{0, 2} {
		if _, err := l.each[i].Import(ctx, "key", private, []byte{1}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.each[1].Generate(ctx, "key", hsmkey.P256, []byte{2}); err != nil {
		t.Fatal(err)
	}
	before := fmt.Sprint(objects(t, l.each[0]), objects(t, l.each[1]), objects(t, l.each[2]))
	results, err := l.fleet.DeleteEach(ctx, hsmkey.Query{Label: "key"})
	wantOutcomes(t, results, hsmkey.Failed, hsmkey.Failed, hsmkey.Failed)
	if !errors.Is(err, hsmkey.ErrAmbiguous) {
		t.Errorf("error %v, want ErrAmbiguous", err)
	}
	if after := fmt.Sprint(objects(t, l.each[0]), objects(t, l.each[1]), objects(t, l.each[2])); before != after {
		t.Errorf("%s objects before, %s after", before, after)
	}
	// By its id the other key is gone, and then the label names one.
	results, err = l.fleet.DeleteEach(ctx, hsmkey.Query{ID: []byte{2}})
	wantOutcomes(t, results, hsmkey.Absent, hsmkey.Deleted, hsmkey.Absent)
	if err != nil {
		t.Error(err)
	}
	if err := l.fleet.Delete(ctx, hsmkey.Query{Label: "key"}); err != nil {
		t.Error(err)
	}
}

func TestNothingIsGeneratedOverBalanceLists(t *testing.T) {
	l := newListed(t, "north", "east")
	if _, err := l.fleet.Generate(context.Background(), "key", hsmkey.P256, nil); !errors.Is(err, hsmkey.ErrUnsupported) {
		t.Errorf("Generate = %v, want ErrUnsupported", err)
	}
	for _, h := range l.each {
		if n := objects(t, h); n != 0 {
			t.Errorf("%d objects were made", n)
		}
	}
}

func TestAWrongPINCostsAFleetOneAttempt(t *testing.T) {
	test := testhsm.New(t, "north", "east", "west")
	spy, calls := testhsm.Spy(t, test)
	list := filepath.Join(t.TempDir(), "active.list")
	var lines string
	for _, label := range test.Labels {
		lines += "pkcs11:token=" + label + "?module-path=" + spy + "\n"
	}
	if err := os.WriteFile(list, []byte(lines), 0o600); err != nil {
		t.Fatal(err)
	}
	c := config(test)
	c.Pool.PIN, c.Balance.Lists = sessionpool.StaticPIN("wrong-"+testhsm.PIN), list
	h := open(t, c)
	_, results, err := h.ImportEach(context.Background(), "key", newKeys(t)[hsmkey.P256], nil)
	wantOutcomes(t, results, hsmkey.Failed, hsmkey.Failed, hsmkey.Failed)
	if !errors.Is(err, hsmkey.ErrPIN) || strings.Contains(err.Error(), testhsm.PIN) {
		t.Errorf("error %v, want ErrPIN without the PIN", err)
	}
	if err := h.Delete(context.Background(), hsmkey.Query{Label: "key"}); !errors.Is(err, hsmkey.ErrPIN) {
		t.Errorf("error %v, want ErrPIN", err)
	}
	if n := calls("C_Login"); n != 1 {
		t.Errorf("%d calls of C_Login, want 1", n)
	}
}

func TestAFleetThatIsClosedAnswersErrClosed(t *testing.T) {
	l := newListed(t, "north")
	if err := l.fleet.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := l.fleet.Import(context.Background(), "key", newKeys(t)[hsmkey.P256], nil); !errors.Is(err, hsmkey.ErrClosed) {
		t.Errorf("Import = %v, want ErrClosed", err)
	}
	if err := l.fleet.Delete(context.Background(), hsmkey.Query{Label: "key"}); !errors.Is(err, hsmkey.ErrClosed) {
		t.Errorf("Delete = %v, want ErrClosed", err)
	}
}
