package main

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/hsmkey/hsmkey/internal/batchfile"
	"github.com/hsmkey/hsmkey/internal/testhsm"
)

// patience bounds the wait for what has to happen.
const patience = 30 * time.Second

// wrongPIN is what scripts use where a PIN is to be rejected.
const wrongPIN = "wrong-pin-4711"

// TestScripts runs testdata/script. A script begins in an empty directory of its
// own, without a token. At its end no output of hsmkey may have had a PIN in it.
func TestScripts(t *testing.T) {
	module := testhsm.ModulePath()
	if module == "" {
		t.Fatal("SoftHSM2 is not installed (Debian: softhsm2)")
	}
	spy, _ := testhsm.Spy(t, &testhsm.HSM{Module: module})
	transcripts := t.TempDir()
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join("testdata", "script"),
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			transcript := filepath.Join(transcripts, filepath.Base(env.WorkDir))
			env.Setenv("TRANSCRIPT", transcript)
			env.Setenv("GORACE", os.Getenv("GORACE"))
			env.Setenv("SOFTHSM", module)
			env.Setenv("SPY", spy)
			env.Setenv("WRONG_PIN", wrongPIN)
			env.Defer(func() {
				if err := noPIN(env.WorkDir, transcript); err != nil {
					t.Errorf("%s: %v", filepath.Base(env.WorkDir), err)
				}
			})
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"refuses":     refuses,
			"logins":      logins,
			"serve":       serve,
			"mode":        mode,
			"hsm":         hsms(t),
			"killed":      killed,
			"interrupted": interrupted,
			"holding":     holding,
		},
	})
}

// noPIN searches the output for the PINs that were in use: the wrong one, and
// those in files of the script whose name ends with "pin".
func noPIN(workDir, transcript string) error {
	output, err := os.ReadFile(transcript)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	pins := map[string]string{wrongPIN: "the wrong PIN"}
	err = filepath.WalkDir(workDir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || !strings.HasSuffix(entry.Name(), "pin") {
			return err
		}
		pin, err := os.ReadFile(path)
		if pin := strings.TrimSpace(string(pin)); pin != "" {
			pins[pin] = path
		}
		return err
	})
	for pin, where := range pins {
		if strings.Contains(string(output), pin) {
			err = errors.Join(err, fmt.Errorf("the PIN of %s is in the output", where))
		}
	}
	return err
}

// refuses runs a command that has to fail: refuses STATUS REGEXP COMMAND [ARG...].
// It has to end with the status, tell in one line why, which the expression
// matches, and in another what to do; to print nothing on standard output; and to
// leave no file behind.
func refuses(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 {
		ts.Fatalf("usage: refuses STATUS REGEXP COMMAND [ARG...]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	why, err := regexp.Compile(args[1])
	ts.Check(err)
	before := listing(ts)
	err = ts.Exec(args[2], args[3:]...)
	status := 0
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		status = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if status != want {
		ts.Fatalf("ends with %d, want %d", status, want)
	}
	if out := ts.ReadFile("stdout"); out != "" {
		ts.Fatalf("standard output is not empty")
	}
	lines := strings.Split(strings.TrimSuffix(ts.ReadFile("stderr"), "\n"), "\n")
	switch {
	case len(lines) != 2 || !strings.HasPrefix(lines[0], "hsmkey: ") || !strings.HasPrefix(lines[1], "hint: "):
		ts.Fatalf("standard error is not one line of failure and one of advice")
	case !why.MatchString(lines[0]):
		ts.Fatalf("the failure does not match %q", args[1])
	}
	if after := listing(ts); !slices.Equal(before, after) {
		ts.Fatalf("files before:\n%s\nand after:\n%s", strings.Join(before, "\n"), strings.Join(after, "\n"))
	}
}

// listing is every file of a script: keys on its tokens are files, too.
func listing(ts *testscript.TestScript) []string {
	var paths []string
	ts.Check(filepath.WalkDir(ts.Getenv("WORK"), func(path string, _ fs.DirEntry, err error) error {
		paths = append(paths, path)
		return err
	}))
	return paths
}

// logins checks how many PINs were sent since it was last called, by processes
// that use $SPY as their module and $PKCS11SPY_OUTPUT as its log: logins COUNT.
func logins(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: logins COUNT")
	}
	path := ts.MkAbs(ts.Getenv("PKCS11SPY_OUTPUT"))
	log, err := os.ReadFile(path)
	ts.Check(err)
	if !strings.Contains(string(log), ": C_Initialize\n") {
		ts.Fatalf("the spy saw nothing")
	}
	got := strings.Count(string(log), ": C_Login\n")
	if want := args[0]; strconv.Itoa(got) != want {
		ts.Fatalf("%d calls of C_Login, want %s", got, want)
	}
	ts.Check(os.Remove(path))
}

// serve publishes a file at $URL, by http on this machine, and at $TLS_URL with a
// certificate that SSL_CERT_FILE makes trusted. $URL/moved redirects to a place
// on another machine, $URL/missing is not there, $URL/endless has no end.
func serve(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: serve FILE")
	}
	content := ts.ReadFile(args[0])
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(content)) })
	mux.HandleFunc("/missing", http.NotFound)
	mux.HandleFunc("/moved", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://keys.example/jwks.json", http.StatusFound)
	})
	mux.HandleFunc("/endless", func(w http.ResponseWriter, _ *http.Request) {
		for line := []byte(strings.Repeat(" ", 4096)); ; {
			if _, err := w.Write(line); err != nil {
				return
			}
		}
	})
	plain, tls := httptest.NewServer(mux), httptest.NewTLSServer(mux)
	ts.Defer(plain.Close)
	ts.Defer(tls.Close)
	ts.Setenv("URL", plain.URL)
	ts.Setenv("TLS_URL", tls.URL)
	certificate := ts.MkAbs("server-certificate.pem")
	ts.Check(os.WriteFile(certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: tls.Certificate().Raw}), 0o600))
	ts.Setenv("SSL_CERT_FILE", certificate)
}

// mode checks the permissions of files: mode OCTAL FILE...
func mode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: mode OCTAL FILE...")
	}
	for _, path := range args[1:] {
		info, err := os.Stat(ts.MkAbs(path))
		ts.Check(err)
		if got := strconv.FormatUint(uint64(info.Mode().Perm()), 8); got != args[0] {
			ts.Fatalf("%s has mode %s, want %s", path, got, args[0])
		}
	}
}

// killed runs a batch and kills it as soon as its unfinished output has some
// bytes: killed BYTES COMMAND ARG... --out FILE ... A run that is faster is fine.
func killed(ts *testscript.TestScript, neg bool, args []string) {
	if run := runAndSignal(ts, neg, args, os.Kill); run.status > 0 {
		ts.Fatalf("ends with %d: %s", run.status, run.stderr)
	}
}

// interrupted is the same with Ctrl-C: the run has to end with status 130, and to
// say how to go on if there are tokens to go on from. With - for BYTES it comes when
// the run waits for its standard input.
func interrupted(ts *testscript.TestScript, neg bool, args []string) {
	run := runAndSignal(ts, neg, args, os.Interrupt)
	said := strings.Contains(run.stderr, "--resume goes on from there")
	if run.status != 0 && (run.status != exitInterrupted || said != run.wrote) {
		ts.Fatalf("ends with %d: %s", run.status, run.stderr)
	}
}

// signalled is what became of a batch that got a signal.
type signalled struct {
	status int // -1 if the signal ended it
	stderr string
	wrote  bool // its unfinished output has grown
}

// runAndSignal runs a batch and sends it a signal. Its standard input has a blank
// line, and then neither says more nor ends.
func runAndSignal(ts *testscript.TestScript, neg bool, args []string, signal os.Signal) signalled {
	out := slices.Index(args, "--out")
	if neg || len(args) < 2 || out < 0 || out+1 == len(args) {
		ts.Fatalf("want BYTES COMMAND ARG... --out FILE ARG...")
	}
	size := func() int64 {
		if info, err := os.Stat(ts.MkAbs(args[out+1]) + batchfile.Suffix); err == nil {
			return info.Size()
		}
		return -1
	}
	before := size()
	stdin, silent, err := os.Pipe()
	ts.Check(err)
	defer stdin.Close()
	defer silent.Close()
	_, err = silent.WriteString("\n")
	ts.Check(err)
	due := func() bool {
		unread, err := unix.Poll([]unix.PollFd{{Fd: int32(stdin.Fd()), Events: unix.POLLIN}}, 0)
		return err == nil && unread == 0
	}
	if args[0] != "-" {
		want, err := strconv.ParseInt(args[0], 10, 64)
		ts.Check(err)
		due = func() bool { return size() >= want }
	}
	program := ""
	for _, dir := range filepath.SplitList(ts.Getenv("PATH")) {
		if path := filepath.Join(dir, args[1]); program == "" {
			if _, err := os.Stat(path); err == nil {
				program = path
			}
		}
	}
	var stderr bytes.Buffer
	cmd := exec.Command(program, args[2:]...)
	cmd.Dir, cmd.Stdin, cmd.Stderr = ts.MkAbs("."), stdin, &stderr
	for _, name := range []string{"PATH", "GORACE", "HOME", "TRANSCRIPT", "SOFTHSM2_CONF", "HSM_MODULE", "HSM_TOKEN", "HSM_PIN_FILE"} {
		if value := ts.Getenv(name); value != "" {
			cmd.Env = append(cmd.Env, name+"="+value)
		}
	}
	ts.Check(cmd.Start())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // its state tells
	}()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for late := time.After(patience); ; {
		select {
		case <-late:
			_ = cmd.Process.Kill()
			<-ended
			ts.Fatalf("it does not end: %s", stderr.String())
		case <-ended:
			return signalled{cmd.ProcessState.ExitCode(), stderr.String(), size() > max(before, 0)}
		case <-tick.C:
			if due() {
				tick.Stop()
				_ = cmd.Process.Signal(signal) // it may have ended just now
			}
		}
	}
}

// holding runs another command of the script's while a file is locked: holding
// FILE COMMAND ARG... It makes the file.
func holding(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 5 || args[1] != "refuses" {
		ts.Fatalf("usage: holding FILE refuses STATUS REGEXP COMMAND [ARG...]")
	}
	file, err := os.Create(ts.MkAbs(args[0]))
	ts.Check(err)
	defer file.Close()
	ts.Check(syscall.Flock(int(file.Fd()), syscall.LOCK_EX))
	refuses(ts, false, args[2:])
	ts.Check(os.Remove(file.Name()))
}
