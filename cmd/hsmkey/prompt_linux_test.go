package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal is a pseudo-terminal: what a person types into and reads.
type terminal struct {
	t      *testing.T
	person *os.File
	shown  chan []byte
	all    bytes.Buffer
	read   int // how much of all the person has read
}

// columns is the width of the terminal.
const columns = 70

// runOnTerminal starts a program with a terminal of its own and a token that it
// has no PIN for.
func runOnTerminal(t *testing.T, dir, program string, args ...string) (*terminal, *exec.Cmd) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { person.Close() })
	fd := int(person.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetUint32(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile("/dev/pts/"+strconv.Itoa(int(number)), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: columns}); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+filepath.Join(dir, ".hsm", "softhsm2.conf"))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		tty.Close()
	})
	term := &terminal{t: t, person: person, shown: make(chan []byte)}
	go func() {
		defer close(term.shown)
		for {
			part := make([]byte, 4096)
			n, err := person.Read(part)
			if err != nil {
				return
			}
			term.shown <- part[:n]
		}
	}()
	return term, cmd
}

// waitFor reads on until the terminal has shown a text.
func (term *terminal) waitFor(text string) {
	term.t.Helper()
	deadline := time.After(patience)
	for {
		if _, rest, found := strings.Cut(term.all.String()[term.read:], text); found {
			term.read = term.all.Len() - len(rest)
			return
		}
		select {
		case part, open := <-term.shown:
			if !open {
				term.t.Fatalf("the terminal showed %q, and no %q", term.all.String(), text)
			}
			term.all.Write(part)
		case <-deadline:
			term.t.Fatalf("the terminal shows %q, and no %q", term.all.String(), text)
		}
	}
}

func (term *terminal) typeIn(text string) {
	term.t.Helper()
	if _, err := term.person.WriteString(text); err != nil {
		term.t.Fatal(err)
	}
}

func (term *terminal) echoes() bool {
	term.t.Helper()
	settings, err := unix.IoctlGetTermios(int(term.person.Fd()), unix.TCGETS)
	if err != nil {
		term.t.Fatal(err)
	}
	return settings.Lflag&unix.ECHO != 0
}

// newToken makes a development token and returns its directory and PIN.
func newToken(t *testing.T) (dir, pin string) {
	t.Helper()
	dir = t.TempDir()
	cmd := exec.Command("hsmkey", "init")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("hsmkey init: %v: %s", err, out)
	}
	content, err := os.ReadFile(filepath.Join(dir, ".hsm", "pin"))
	if err != nil {
		t.Fatal(err)
	}
	return dir, strings.TrimSpace(string(content))
}

func TestThePINIsAskedForWithoutEcho(t *testing.T) {
	dir, pin := newToken(t)
	term, cmd := runOnTerminal(t, dir, "hsmkey", "key", "list")
	term.waitFor("PIN: ")
	if term.echoes() {
		t.Fatal("the terminal echoes")
	}
	term.typeIn(pin + "\n")
	term.waitFor("The token has no keys")
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if strings.Contains(term.all.String(), pin) {
		t.Error("the terminal shows the PIN")
	}
	if !term.echoes() {
		t.Error("the terminal is left without echo")
	}
}

func TestCtrlCAtThePromptEndsAndRestoresTheTerminal(t *testing.T) {
	dir, _ := newToken(t)
	term, cmd := runOnTerminal(t, dir, "hsmkey", "key", "list")
	term.waitFor("PIN: ")
	if term.echoes() {
		t.Fatal("the terminal echoes")
	}
	term.typeIn("\x03")
	term.waitFor("hsmkey: interrupted")
	err := cmd.Wait()
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != exitInterrupted {
		t.Errorf("ends with %v, want status %d", err, exitInterrupted)
	}
	if !term.echoes() {
		t.Error("the terminal is left without echo")
	}
}

func TestCtrlDAtThePromptIsNoPIN(t *testing.T) {
	dir, _ := newToken(t)
	term, cmd := runOnTerminal(t, dir, "hsmkey", "key", "list")
	term.waitFor("PIN: ")
	term.typeIn("\x04")
	term.waitFor("hsmkey: the PIN is empty; it was not sent")
	err := cmd.Wait()
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != exitPIN {
		t.Errorf("ends with %v, want status %d", err, exitPIN)
	}
}

func TestThePINIsNotShownAfterCtrlZAtThePrompt(t *testing.T) {
	t.Setenv("LC_ALL", "C")
	t.Setenv("HISTFILE", "")
	dir, pin := newToken(t)
	term, shell := runOnTerminal(t, dir, "bash", "--norc", "-i")
	term.typeIn("hsmkey key list\n")
	term.waitFor("PIN: ")
	term.typeIn("\x1a")
	term.waitFor("Stopped")
	term.typeIn("fg\n")
	term.waitFor("PIN: ")
	term.typeIn(pin + "\n")
	term.waitFor("The token has no keys")
	term.typeIn("exit\n")
	if err := shell.Wait(); err != nil {
		t.Error(err)
	}
	if strings.Contains(term.all.String(), pin) {
		t.Error("the terminal shows the PIN")
	}
}

func TestCtrlCAtTheQuestionDeletesNothing(t *testing.T) {
	dir, pin := newToken(t)
	env := append(os.Environ(), "HSM_PIN="+pin)
	generate := exec.Command("hsmkey", "key", "generate", "demo", "--type", "ec:P-256")
	generate.Dir, generate.Env = dir, env
	if out, err := generate.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Setenv("HSM_PIN", pin)
	term, cmd := runOnTerminal(t, dir, "hsmkey", "key", "delete", "demo")
	term.waitFor("[y/N] ")
	term.typeIn("\x03")
	term.waitFor("hsmkey: interrupted")
	_ = cmd.Wait()
	list := exec.Command("hsmkey", "key", "list")
	list.Dir = dir
	out, err := list.Output()
	if err != nil || !strings.Contains(string(out), "demo") {
		t.Errorf("the key is gone: %v, %s", err, out)
	}
}
