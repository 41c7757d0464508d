package testhsm_test

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"
	"go.uber.org/goleak"

	"github.com/hsmkey/hsmkey/internal/testhsm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// tokenLabels initialises the module in this process and returns the labels of
// the initialised tokens that it shows.
func tokenLabels(t *testing.T, module string) []string {
	t.Helper()
	p := load(t, module)
	slots, err := p.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	var labels []string
	for _, slot := range slots {
		info, err := p.GetTokenInfo(slot)
		if err != nil {
			t.Fatal(err)
		}
		if info.Flags&pkcs11.CKF_TOKEN_INITIALIZED != 0 {
			labels = append(labels, strings.TrimRight(info.Label, " \x00"))
		}
	}
	slices.Sort(labels)
	return labels
}

// load loads and initialises a module until the test ends.
func load(t *testing.T, module string) *pkcs11.Ctx {
	t.Helper()
	p := pkcs11.New(module)
	if p == nil {
		t.Fatalf("cannot load %s", module)
	}
	t.Cleanup(p.Destroy)
	if err := p.Initialize(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Finalize() })
	return p
}

// login opens a session on the first token with a PIN and logs in.
func login(t *testing.T, p *pkcs11.Ctx) pkcs11.SessionHandle {
	t.Helper()
	session, err := openAndLogin(p)
	if err != nil {
		t.Fatal(err)
	}
	return session
}

func openAndLogin(p *pkcs11.Ctx) (pkcs11.SessionHandle, error) {
	slots, err := p.GetSlotList(true)
	if err != nil {
		return 0, err
	}
	if len(slots) == 0 {
		return 0, pkcs11.Error(pkcs11.CKR_TOKEN_NOT_PRESENT)
	}
	session, err := p.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		return 0, err
	}
	return session, p.Login(session, pkcs11.CKU_USER, testhsm.PIN)
}

func TestANewHSMHasOneTokenPerLabel(t *testing.T) {
	h := testhsm.New(t, "east", "west side")
	if got, want := tokenLabels(t, h.Module), []string{"east", "west side"}; !slices.Equal(got, want) {
		t.Errorf("tokens = %q, want %q", got, want)
	}
}

func TestTheNextHSMOfTheProcessIsAnotherOne(t *testing.T) {
	// Subtests, so that the first HSM's module is finalised before the second's
	// configuration is to be read.
	for _, label := range []string{"first", "second"} {
		t.Run(label, func(t *testing.T) {
			h := testhsm.New(t, label)
			if got := tokenLabels(t, h.Module); !slices.Equal(got, []string{label}) {
				t.Errorf("tokens = %q, want only %q", got, label)
			}
		})
	}
}

func TestTheDefaultTokenTakesThePIN(t *testing.T) {
	h := testhsm.New(t)
	if !slices.Equal(h.Labels, []string{testhsm.DefaultLabel}) {
		t.Errorf("labels = %q", h.Labels)
	}
	login(t, load(t, h.Module))
}

func TestADetachedHSMLeavesTheEnvironmentAlone(t *testing.T) {
	t.Setenv("SOFTHSM2_CONF", "untouched")
	testhsm.NewDetached(t)
	if got := os.Getenv("SOFTHSM2_CONF"); got != "untouched" {
		t.Errorf("SOFTHSM2_CONF = %q", got)
	}
}

func TestEnvPointsAChildToTheToken(t *testing.T) {
	h := testhsm.NewDetached(t, "for a child")
	cmd := exec.Command("sh", "-c", `exec softhsm2-util --show-slots --module "$HSM_MODULE"`)
	cmd.Env = append(os.Environ(), h.Env()...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if !strings.Contains(string(out), "for a child") {
		t.Errorf("the child does not see the token:\n%s", out)
	}
	for _, want := range []string{"HSM_TOKEN=for a child", "HSM_PIN=" + testhsm.PIN} {
		if !slices.Contains(h.Env(), want) {
			t.Errorf("Env() = %q lacks %q", h.Env(), want)
		}
	}
}

func TestADirectoryThatSoftHSM2WouldMisreadIsRefused(t *testing.T) {
	_, err := testhsm.Create("/tmp/with#comment")
	if err == nil || !strings.Contains(err.Error(), "with#comment") {
		t.Errorf("Create = %v, want an error that names the directory", err)
	}
}

func TestATokenLabelThatIsTooLongIsReported(t *testing.T) {
	_, err := testhsm.Create(t.TempDir(), strings.Repeat("x", 33))
	if err == nil || !strings.Contains(err.Error(), "xxx") {
		t.Errorf("Create = %v, want an error that names the label", err)
	}
}
