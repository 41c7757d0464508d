package balance_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"github.com/hsmkey/hsmkey/balance"
	"github.com/hsmkey/hsmkey/sessionpool"
)

func slot(n uint) *uint { return &n }

func parse(t *testing.T, text string) []balance.Endpoint {
	t.Helper()
	endpoints, err := balance.ParseList("list", strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return endpoints
}

func TestAListHasOneEndpointALine(t *testing.T) {
	got := parse(t, "# two racks\n"+
		"\n"+
		"10.0.20.1 4433\n"+
		"  10.0.20.2\t \t4433  # rack 2\r\n"+
		"\t#10.0.20.3 4433\n"+
		"::1 4434\n"+
		"[2001:DB8::0:1] 4433\n"+
		"fe80::1%eth0 4433\n"+
		"hsm-a.example.com 1\n"+
		"HSM_b. 65535 #\n"+
		"pkcs11:token=hsm%20c?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/run/pin # here\n"+
		"PKCS11:serial=01;slot-id=7?module-path=/lib/a.so")
	want := []balance.Endpoint{
		{Host: "10.0.20.1", Port: 4433},
		{Host: "10.0.20.2", Port: 4433},
		{Host: "::1", Port: 4434},
		{Host: "2001:db8::1", Port: 4433},
		{Host: "fe80::1%eth0", Port: 4433},
		{Host: "hsm-a.example.com", Port: 1},
		{Host: "HSM_b.", Port: 65535},
		{Token: "hsm c", ModulePath: "/usr/lib/softhsm/libsofthsm2.so", PINSource: "/run/pin"},
		{Serial: "01", Slot: slot(7), ModulePath: "/lib/a.so"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestTheDocumentedListIsAList(t *testing.T) {
	page, err := os.ReadFile("../docs/load-balancing.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(page), "## The list\n\n```text\n")
	list, _, found := strings.Cut(section, "```\n")
	if !found {
		t.Fatal("there is no list under its heading")
	}
	if n := len(parse(t, list)); n != 6 {
		t.Errorf("%d endpoints", n)
	}
}

func TestEndpointsSayWhatTheyAre(t *testing.T) {
	for line, want := range map[string]string{
		"10.0.20.1   4433": "10.0.20.1:4433",
		"[::1] 4433":       "[::1]:4433",
		"hsm-a 4433":       "hsm-a:4433",
		"pkcs11:slot-id=1;token=hsm%20a?pin-source=/run/pin&module-path=/lib/a.so": "pkcs11:token=hsm%20a;slot-id=1?pin-source=file:///run/pin&module-path=/lib/a.so",
	} {
		if got := parse(t, line)[0].String(); got != want {
			t.Errorf("%q is %q, want %q", line, got, want)
		}
	}
}

func TestNothingThatIsPrintedHoldsThePIN(t *testing.T) {
	endpoints := parse(t, "pkcs11:token=a?module-path=/lib/a.so&pin-value=s3cret")
	e := endpoints[0]
	if e.PINValue() != "s3cret" {
		t.Fatal("the PIN is not there")
	}
	lists := balance.Lists{{Path: "a", Endpoints: endpoints}}
	inside := struct{ hidden balance.Endpoint }{e} // fmt calls no methods on unexported fields
	asJSON, err := json.Marshal(lists)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{
		e.String(), string(asJSON),
		fmt.Sprintf("%v %+v %#v %s %q", e, e, e, e, e),
		fmt.Sprintf("%v %+v %#v", lists, lists, lists),
		fmt.Sprintf("%v %+v %#v", inside, inside, inside),
	} {
		if strings.Contains(text, "s3cret") {
			t.Errorf("PIN in %s", text)
		}
	}
}

func TestBadListsAreRefusedWithLineAndColumn(t *testing.T) {
	many := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, "10.0.0.%d 4433\n", i+1)
		}
		return b.String()
	}
	parse(t, many(balance.MaxEndpoints))
	comment := "10.0.0.1 4433 #" + strings.Repeat("x", balance.MaxListSize)
	parse(t, comment[:balance.MaxListSize])
	label := strings.Repeat("a", 63)
	parse(t, label+" 1")

	const module = "?module-path=/lib/a.so"
	for _, test := range []struct {
		text         string
		line, column int
	}{
		{"", 0, 0},
		{"\n# nothing\n \t\n", 0, 0},
		{comment, 0, 0},
		{many(balance.MaxEndpoints + 1), 17, 1},

		{"10.0.0.1", 1, 9},
		{"10.0.0.1:4433", 1, 14},
		{"10.0.0.1 # 4433", 1, 9},
		{"10.0.0.1 4433 4434", 1, 15},
		{"10.0.0.1 4433 hsm-a", 1, 15},
		{"10.0.0.1 0", 1, 10},
		{"10.0.0.1 65536", 1, 10},
		{"10.0.0.1 -1", 1, 10},
		{"10.0.0.1 +1", 1, 10},
		{"10.0.0.1 04433", 1, 10},
		{"10.0.0.1 https", 1, 10},
		{"10.0.0.1 4433#", 1, 10},
		{"10.0.0.1,4433", 1, 14},
		{"10.0.0.1\u00a04433", 1, 9},

		{"\n\n  10.0.0.256 4433", 3, 3},
		{"10.0.0 4433", 1, 1},
		{"10.0.0.1.1 4433", 1, 1},
		{"010.0.0.1 4433", 1, 1},
		{"1 4433", 1, 1},
		{"10.0.0.1/8 4433", 1, 1},
		{"[10.0.0.1] 4433", 1, 1},
		{"[::1 4433", 1, 1},
		{"::1] 4433", 1, 1},
		{"[] 4433", 1, 1},
		{"[hsm-a] 4433", 1, 1},
		{":::1 4433", 1, 1},
		{"[::1]:4433", 1, 11},
		{"10.0.0.1:4433 4433", 1, 1},
		{"hsm..a 4433", 1, 1},
		{". 4433", 1, 1},
		{"-hsm 4433", 1, 1},
		{"hsm- 4433", 1, 1},
		{"hsm$a 4433", 1, 1},
		{"a" + label + " 4433", 1, 1},
		{strings.Repeat("a.", 127) + "a 4433", 1, 1},

		{"10.0.0.1 4433\n10.0.0.2 4433\nhs\u00f6 4433", 3, 3},
		{"\ufeff10.0.0.1 4433", 1, 1},
		{"10.0.0.1 4433 # \u00f6", 1, 17},
		{"10.0.0.1 4433\r\r\n", 1, 14},
		{"10.0.0.1 4433\r10.0.0.2 4433", 1, 14},
		{"10.0.0.1\x004433", 1, 9},
		{"10.0.0.1\v4433", 1, 9},
		{"10.0.0.1 4433 #\x7f", 1, 16},

		{"10.0.0.1 4433\n10.0.0.2 4433\n 10.0.0.1 4433", 3, 2},
		{"::1 4433\n[0:0::1] 4433", 2, 1},
		{"10.0.0.1 4433\n::ffff:10.0.0.1 4433", 2, 1},
		{"hsm-a 4433\nHSM-A. 4433", 2, 1},
		{"pkcs11:token=a" + module + "\npkcs11:token=%61" + module + "&pin-source=/run/pin", 2, 1},

		{" pkcs11:token=a", 1, 2},
		{" pkcs11:" + module, 1, 2},
		{" pkcs11:token=a;tokn=b" + module, 1, 17},
		{" pkcs11:token=a#b" + module, 1, 16},
		{" pkcs11:token=a" + module + " 4433", 1, 39},
		{" pkcs11:token=a b" + module, 1, 2},
		{"pkcs11:token=a;object=b" + module, 1, 16},
		{"pkcs11:token=a;model=b" + module, 1, 16},
		{"pkcs11:token=a" + module + "&module-name=b", 1, 38},
		{"pkcs11:token=a?module-path=a.so", 1, 16},
		{"pkcs11:token=a" + module + "&pin-source=|cat", 1, 38},
		{"pkcs11 4433 x", 1, 13},
	} {
		endpoints, err := balance.ParseList("the list", strings.NewReader(test.text))
		var bad *balance.ListError
		if !errors.As(err, &bad) || !errors.Is(err, sessionpool.ErrConfig) || endpoints != nil {
			t.Errorf("%.60q: %v, %v; want a ListError that matches ErrConfig", test.text, endpoints, err)
			continue
		}
		if bad.Line != test.line || bad.Column != test.column || bad.File != "the list" || bad.Reason == "" {
			t.Errorf("%.60q: %v; want line %d, column %d", test.text, err, test.line, test.column)
		}
	}
}

func TestAListErrorNamesFileLineAndColumn(t *testing.T) {
	_, err := balance.ParseList("/etc/hsm.list", strings.NewReader("10.0.0.1 4433\n10.0.0.2\n"))
	want := "balance list /etc/hsm.list, line 2, column 9: the port is missing"
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

func TestAReadErrorIsNotAnEmptyList(t *testing.T) {
	cause := errors.New("disk on fire")
	_, err := balance.ParseList("list", iotest.ErrReader(cause))
	if !errors.Is(err, cause) || !errors.Is(err, sessionpool.ErrConfig) {
		t.Errorf("error: %v", err)
	}
}

// write makes a file and returns its path.
func write(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func join(paths ...string) string { return strings.Join(paths, string(filepath.ListSeparator)) }

func TestListsAreLoadedInTheirOrder(t *testing.T) {
	active, passive := write(t, "active", "10.0.0.1 4433\n10.0.0.2 4433\n"), write(t, "passive", "10.0.0.3 4433\n")
	got, err := balance.LoadLists(join(active, passive))
	if err != nil {
		t.Fatal(err)
	}
	want := balance.Lists{
		{Path: active, Endpoints: []balance.Endpoint{{Host: "10.0.0.1", Port: 4433}, {Host: "10.0.0.2", Port: 4433}}},
		{Path: passive, Endpoints: []balance.Endpoint{{Host: "10.0.0.3", Port: 4433}}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestTheNumberOfListsIsLimited(t *testing.T) {
	path := write(t, "list", "10.0.0.1 4433\n")
	paths := make([]string, balance.MaxLists+1)
	for i := range paths {
		paths[i] = path
	}
	if _, err := balance.LoadLists(join(paths[1:]...)); err != nil {
		t.Errorf("%d lists: %v", balance.MaxLists, err)
	}
	for name, value := range map[string]string{
		"too many":     join(paths...),
		"none":         "",
		"an empty one": join(path, "", path),
		"one too much": join(path, ""),
	} {
		if lists, err := balance.LoadLists(value); !errors.Is(err, sessionpool.ErrConfig) || lists != nil {
			t.Errorf("%s: %v, %v; want ErrConfig", name, lists, err)
		}
	}
}

func TestWhatIsNoReadableFileIsRefusedAtOnce(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	good := write(t, "good", "10.0.0.1 4433\n")
	for name, test := range map[string]struct {
		path  string
		cause error
	}{
		"missing":         {filepath.Join(t.TempDir(), "missing"), fs.ErrNotExist},
		"directory":       {t.TempDir(), nil},
		"fifo":            {fifo, nil}, // hangs if it is opened for reading
		"device":          {"/dev/zero", nil},
		"too large":       {write(t, "large", strings.Repeat("\n", balance.MaxListSize+1)), nil},
		"bad in 2nd list": {write(t, "bad", "10.0.0.1\n"), nil},
	} {
		lists, err := balance.LoadLists(join(good, test.path))
		var bad *balance.ListError
		if !errors.As(err, &bad) || !errors.Is(err, sessionpool.ErrConfig) || lists != nil {
			t.Errorf("%s: %v, %v; want a ListError that matches ErrConfig", name, lists, err)
			continue
		}
		if bad.File != test.path || test.cause != nil && !errors.Is(err, test.cause) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// loadAsNobody marks a child process of the next test; its value is the path.
const loadAsNobody = "BALANCE_TEST_LOAD"

func TestAFileWithoutReadPermissionIsRefused(t *testing.T) {
	if path := os.Getenv(loadAsNobody); path != "" { // the child
		_, err := balance.LoadLists(path)
		var bad *balance.ListError
		if !errors.As(err, &bad) || !errors.Is(err, sessionpool.ErrConfig) || !errors.Is(err, fs.ErrPermission) {
			t.Errorf("as user %d: %v; want a ListError that matches ErrConfig and ErrPermission", os.Getuid(), err)
		}
		return
	}
	// Permissions do not bind root, so the child is somebody else. What it
	// runs and what it must not read have to be within its reach otherwise.
	dir, err := os.MkdirTemp("", "balance")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path, program := filepath.Join(dir, "list"), filepath.Join(dir, "balance.test")
	self, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{path: []byte("10.0.0.1 4433\n"), program: self} {
		if err := os.WriteFile(name, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, mode := range map[string]fs.FileMode{dir: 0o755, program: 0o755, path: 0} {
		if err := os.Chmod(name, mode); err != nil {
			t.Fatal(err)
		}
	}
	child := exec.Command(program, "-test.run=^"+t.Name()+"$", "-test.count=1")
	child.Dir = dir
	child.Env = append(os.Environ(), loadAsNobody+"="+path, "GOCOVERDIR="+dir)
	if os.Getuid() == 0 {
		child.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	if out, err := child.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestListsAreEqualWhenTheirEndpointsAre(t *testing.T) {
	load := func(content string) balance.Lists {
		return balance.Lists{{Path: "list", Endpoints: parse(t, content)}}
	}
	const uri = "pkcs11:token=a;slot-id=1?module-path=/lib/a.so"
	base := load("10.0.0.1 4433\n10.0.0.2 4433\n" + uri + "&pin-value=1111")
	same := load("# moved\n10.0.0.1\t4433 \r\n\r\n10.0.0.2 4433 #\n" + uri + "&pin-value=1111\n")
	if !base.Equal(same) {
		t.Error("comments and blanks make a difference")
	}
	for name, content := range map[string]string{
		"order":      "10.0.0.2 4433\n10.0.0.1 4433\n" + uri + "&pin-value=1111",
		"port":       "10.0.0.1 4434\n10.0.0.2 4433\n" + uri + "&pin-value=1111",
		"fewer":      "10.0.0.1 4433\n" + uri + "&pin-value=1111",
		"more":       "10.0.0.1 4433\n10.0.0.2 4433\n" + uri + "&pin-value=1111\n10.0.0.3 4433",
		"PIN":        "10.0.0.1 4433\n10.0.0.2 4433\n" + uri + "&pin-value=2222",
		"no PIN":     "10.0.0.1 4433\n10.0.0.2 4433\n" + uri,
		"PIN source": "10.0.0.1 4433\n10.0.0.2 4433\n" + uri + "&pin-source=/run/pin",
	} {
		if base.Equal(load(content)) {
			t.Errorf("%s makes no difference", name)
		}
	}
	if base.Equal(balance.Lists{{Path: "another", Endpoints: base[0].Endpoints}}) {
		t.Error("the path makes no difference")
	}
	if base.Equal(append(load("10.0.0.1 4433"), base...)) || base.Equal(nil) {
		t.Error("the number of lists makes no difference")
	}
}

func FuzzParseList(f *testing.F) {
	f.Add("10.0.20.1 4433\n10.0.20.2        4433\n")
	f.Add("# comment\r\n[::1] 4433 # here\r\nhsm_a.example. 65535")
	f.Add("pkcs11:token=a%20b;serial=1;slot-id=0?module-path=/lib/a.so&pin-source=file:/run/pin\n")
	f.Add("pkcs11:token=a?module-path=/lib/a.so&pin-value=1234&acme=1\n")
	f.Fuzz(func(t *testing.T, text string) {
		endpoints, err := balance.ParseList("list", strings.NewReader(text))
		if err != nil {
			var bad *balance.ListError
			if !errors.As(err, &bad) || !errors.Is(err, sessionpool.ErrConfig) || endpoints != nil {
				t.Fatalf("%v, %v", endpoints, err)
			}
			if lines := strings.Count(text, "\n") + 1; bad.Line < 0 || bad.Line > lines || bad.Column < 0 || bad.Column > len(text)+1 {
				t.Fatalf("line %d, column %d of %d lines, %d bytes", bad.Line, bad.Column, lines, len(text))
			}
			return
		}
		if len(endpoints) == 0 || len(endpoints) > balance.MaxEndpoints {
			t.Fatalf("%d endpoints", len(endpoints))
		}
		var again strings.Builder
		withPIN := false
		for _, e := range endpoints {
			withPIN = withPIN || e.PINValue() != ""
			if e.ModulePath != "" {
				fmt.Fprintln(&again, e)
				continue
			}
			if addr, err := netip.ParseAddr(e.Host); err == nil && addr.String() != e.Host {
				t.Fatalf("host %q is not canonical", e.Host)
			}
			fmt.Fprintln(&again, e.Host, e.Port)
		}
		reread, err := balance.ParseList("list", strings.NewReader(again.String()))
		if err != nil {
			t.Fatalf("%q, written as %q: %v", text, again.String(), err)
		}
		before, after := balance.Lists{{Endpoints: endpoints}}, balance.Lists{{Endpoints: reread}}
		if before.Equal(after) == withPIN {
			t.Fatalf("%v became %v", endpoints, reread)
		}
	})
}
