package doctor_test

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/doctor"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// slow is a limit for PKCS#11 calls that a machine under load does not reach.
const slow = time.Minute

// config is the configuration of a test HSM's first token.
func config(h *testhsm.HSM) hsmkey.Config {
	return hsmkey.Config{Pool: sessionpool.Config{
		Module: h.Module, TokenLabel: h.Labels[0], PIN: sessionpool.StaticPIN(testhsm.PIN), OpTimeout: slow,
	}}
}

// run examines an HSM. No report may have a PIN in it.
func run(t *testing.T, c hsmkey.Config, change ...func(*doctor.Options)) *doctor.Report {
	t.Helper()
	o := doctor.Options{Config: c, PIN: doctor.PINOrigin{Words: "a test"}}
	for _, ch := range change {
		ch(&o)
	}
	report := doctor.Run(context.Background(), o)
	text, err := json.Marshal(report)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range report.Failures() {
		text = append(text, f.Err.Error()...)
	}
	if strings.Contains(string(text), testhsm.PIN) {
		t.Errorf("the PIN is in the report: %s", text)
	}
	return report
}

func withKey(label string) func(*doctor.Options) {
	return func(o *doctor.Options) { o.Key = hsmkey.Query{Label: label} }
}

// all are the checks of a report, those of its endpoints too.
func all(r *doctor.Report) []doctor.Check {
	checks := slices.Clone(r.Checks)
	for _, e := range r.Endpoints {
		checks = append(checks, e.Checks...)
	}
	return checks
}

// names are the checks by name and status.
func names(checks []doctor.Check) string {
	var words []string
	for _, c := range checks {
		word := c.Name
		if c.Status != doctor.OK {
			word += "=" + string(c.Status)
		}
		words = append(words, word)
	}
	return strings.Join(words, ", ")
}

func wantNames(t *testing.T, checks []doctor.Check, want string) {
	t.Helper()
	if got := names(checks); got != want {
		t.Errorf("checks %s\nwant   %s\n%+v", got, want, checks)
	}
}

// check is the one check of a name.
func check(t *testing.T, checks []doctor.Check, name string) doctor.Check {
	t.Helper()
	at := slices.IndexFunc(checks, func(c doctor.Check) bool { return c.Name == name })
	if at < 0 {
		t.Fatalf("there is no check %q in %s", name, names(checks))
	}
	if c := checks[at]; c.Status != doctor.OK && c.Hint == "" {
		t.Errorf("%s has no hint", name)
	}
	return checks[at]
}

// write makes a file of lines, such as a balance list.
func write(t *testing.T, mode os.FileMode, lines ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

// open opens an HSM until the test ends.
func open(t *testing.T, c hsmkey.Config) *hsmkey.HSM {
	t.Helper()
	h, err := hsmkey.Open(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return h
}
