package main

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// notRun stands before a block of commands that the tests cannot run.
const notRun = "<!-- not run by the tests -->\n"

var shellBlock = regexp.MustCompile("(?s)(" + notRun + ")?```sh\n(.*?)```\n")

// command is a command of a page with the output that the page shows, in lines
// that begin with "# ".
type command struct{ line, output string }

// commandsOf returns the commands of all blocks of a page that are to be run.
func commandsOf(t *testing.T, page string) []command {
	t.Helper()
	content, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	var commands []command
	for _, block := range shellBlock.FindAllStringSubmatch(string(content), -1) {
		if block[1] != "" {
			continue
		}
		for line := range strings.Lines(block[2]) {
			if output, shown := strings.CutPrefix(line, "# "); shown {
				commands[len(commands)-1].output += output
			} else {
				commands = append(commands, command{line: line})
			}
		}
	}
	if len(commands) == 0 {
		t.Fatalf("%s has no commands", page)
	}
	return commands
}

// varying is what differs from run to run: thumbprints, ids and times.
var varying = regexp.MustCompile(`[-_A-Za-z0-9]{43}|\b[0-9a-f]{32}\b|\b1[0-9]{9}\b`)

func TestPagesShowCommandsThatWorkAndWhatTheyPrint(t *testing.T) {
	for _, page := range []string{"README.md", filepath.Join("docs", "getting-started.md")} {
		t.Run(page, func(t *testing.T) {
			commands := commandsOf(t, filepath.Join("..", "..", page))
			const end = "\x00"
			var script strings.Builder
			script.WriteString("exec 2>&1\n")
			for _, c := range commands {
				script.WriteString(c.line + "printf '\\0'\n")
			}
			shell := exec.Command("bash", "-e", "-c", script.String())
			shell.Dir = t.TempDir()
			out, err := shell.Output()
			outputs := strings.Split(string(out), end)
			if err != nil {
				t.Fatalf("%s%v: %s", commands[len(outputs)-1].line, err, outputs[len(outputs)-1])
			}
			for i, c := range commands {
				got, want := outputs[i], c.output
				if want == "" {
					continue
				}
				if !strings.HasSuffix(got, "\n") {
					got += "\n"
				}
				if varying.ReplaceAllString(got, "…") != varying.ReplaceAllString(want, "…") {
					t.Errorf("%sprints\n%sthe page shows\n%s", c.line, got, want)
				}
			}
		})
	}
}

// TestTheFleetsOfThePageOnLoadBalancing does what the page says, from the tokens of
// its trial on, with this machine in the place of the hosts that it invents.
func TestTheFleetsOfThePageOnLoadBalancing(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "..", "docs", "load-balancing.md"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	// block is the one block of the page that has these words.
	block := func(words, port string) string {
		t.Helper()
		var found []string
		for _, b := range shellBlock.FindAllStringSubmatch(string(page), -1) {
			if strings.Contains(b[2], words) {
				found = append(found, b[2])
			}
		}
		if len(found) != 1 {
			t.Fatalf("%d blocks have %q", len(found), words)
		}
		return strings.NewReplacer("/etc/hsmkey", dir, "hsm-a.example.com", "localhost", "10.0.20.1", "127.0.0.1", "4433", port).Replace(found[0])
	}
	// host runs a block until the end, and waits until it serves.
	host := func(command, address, port string) string {
		return "SOFTHSM2_CONF=try/hsm-a.conf " + strings.TrimSpace(command) + " &\n" +
			"until (exec 3<>/dev/tcp/" + address + "/" + port + "); do kill -0 $!; done 2>/dev/null\n"
	}
	encrypted, plain := freePort(t, "127.0.0.1"), freePort(t, "127.0.0.2")
	const check = "hsmkey doctor --key ec && hsmkey sign --key ec --claims '{}' | hsmkey verify --key ec -\n"
	script := "trap 'kill $(jobs -p)' EXIT\nexec 2>&1\n" + block("mkdir -p try", "") +
		"unset HSM_REMOTE HSM_MODULE HSM_REMOTE_ENV\n" +
		block("openssl req -x509", "") + host(block("OPENSSL-LISTEN", encrypted), "127.0.0.1", encrypted) +
		block("pkcs11-tool", encrypted) + "unset P11_KIT_SERVER_ADDRESS\n" +
		block("export HSM_TLS_CA", "") + "echo localhost " + encrypted + " > active.list\n" +
		"openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 | hsmkey key import ec --in -\n" + check +
		"unset HSM_TLS_CA HSM_TLS_CERT HSM_TLS_KEY\n" +
		host(block("TCP-LISTEN", plain), "127.0.0.2", plain) + "echo 127.0.0.2 " + plain + " > active.list\n" + check
	shell := exec.Command("bash", "-e", "-o", "pipefail", "-c", script)
	shell.Dir = dir
	out, err := shell.Output()
	if err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	for _, want := range []string{
		"\nhsm-b:1 +ok +vendor +hsm b +verified +ok ",
		"token label +: hsm a\n",
		"\nlocalhost:[0-9]+ +ok +TLS +hsm a +verified +ok ",
		"\n127.0.0.2:[0-9]+ +ok +plaintext +hsm a +verified +ok ",
	} {
		if !regexp.MustCompile(want).Match(out) {
			t.Errorf("nothing matches %q", want)
		}
	}
	if regexp.MustCompile(" (warn|fail) ").Match(out) {
		t.Error("doctor has something to say")
	}
	if t.Failed() {
		t.Logf("%s", out)
	}
}

// freePort is a port of an address on which nobody listens.
func freePort(t *testing.T, address string) string {
	t.Helper()
	l, err := net.Listen("tcp", address+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // it only listened
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

func TestTheProgramOfTheREADMEIsTheExample(t *testing.T) {
	readme, err := os.ReadFile(filepath.Join("..", "..", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	example, err := os.ReadFile(filepath.Join("..", "..", "examples", "issue", "main.go"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(readme), "```go\n")
	program, _, found := strings.Cut(rest, "```\n")
	if !found || !strings.Contains(string(example), program) {
		t.Error("README.md shows Go that is not in examples/issue")
	}
}
