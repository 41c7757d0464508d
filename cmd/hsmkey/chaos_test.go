package main

import (
	"bufio"
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	crand "crypto/rand"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/hsmkey/hsmkey/internal/batchfile"
	"github.com/hsmkey/hsmkey/internal/testhsm"
)

// These tests do their worst to `hsmkey batch` and to the HSMs under it, and look at
// the file that comes of it. HSMKEY_CHAOS=long does it for longer.

func long() bool { return os.Getenv("HSMKEY_CHAOS") == "long" }

// batchTest is a file of claims, and the program that signs them.
type batchTest struct {
	t      testing.TB
	dir    string
	env    []string
	tokens int
	public crypto.PublicKey
}

func newBatchTest(t testing.TB, tokens int, public crypto.PublicKey, env ...string) *batchTest {
	t.Helper()
	b := &batchTest{t: t, dir: t.TempDir(), env: append(os.Environ(), env...), tokens: tokens, public: public}
	self, err := os.Executable()
	b.check(err)
	b.check(os.Symlink(self, b.path("hsmkey"))) // by its name it knows what to be
	file, err := os.Create(b.path("claims.jsonl"))
	b.check(err)
	claims := bufio.NewWriter(file)
	for i := range tokens {
		fmt.Fprintln(claims, claimsOf(i))
	}
	b.check(errors.Join(claims.Flush(), file.Close()))
	return b
}

func claimsOf(i int) string { return fmt.Sprintf(`{"sub":"user-%d"}`, i) }

func (b *batchTest) check(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b *batchTest) path(name string) string { return filepath.Join(b.dir, name) }

// written is how much of a file is written, finished or not.
func (b *batchTest) written(name string) int64 {
	for _, suffix := range []string{batchfile.Suffix, ""} {
		if info, err := os.Stat(b.path(name) + suffix); err == nil {
			return info.Size()
		}
	}
	return 0
}

// batchProcess is a run of the program.
type batchProcess struct {
	cmd    *exec.Cmd
	stderr bytes.Buffer
	ended  chan struct{}
}

func (b *batchTest) start(out string, flags ...string) *batchProcess {
	b.t.Helper()
	p := &batchProcess{ended: make(chan struct{})}
	p.cmd = exec.Command(b.path("hsmkey"), append([]string{"batch", "--key", "key", "--in", b.path("claims.jsonl"), "--out", b.path(out)}, flags...)...)
	p.cmd.Env, p.cmd.Stderr = b.env, &p.stderr
	b.check(p.cmd.Start())
	go func() {
		defer close(p.ended)
		_ = p.cmd.Wait() // its state tells
	}()
	b.t.Cleanup(func() { p.kill() })
	return p
}

func (p *batchProcess) kill() {
	_ = p.cmd.Process.Kill() // it may have ended
	<-p.ended
}

// runs reports whether the run goes on, and waits a moment if it does.
func (p *batchProcess) runs() bool {
	select {
	case <-p.ended:
		return false
	case <-time.After(time.Millisecond):
		return true
	}
}

// succeeds waits for the end of a run.
func (b *batchTest) succeeds(p *batchProcess) {
	b.t.Helper()
	<-p.ended
	if status := p.cmd.ProcessState.ExitCode(); status != 0 {
		b.t.Fatalf("exit status %d: %s", status, p.stderr.String())
	}
	b.t.Logf("%s", strings.TrimSpace(p.stderr.String()))
}

// complete checks that a file has the token of each line, in order, and that each
// verifies by a library that is not ours.
func (b *batchTest) complete(out string) {
	b.t.Helper()
	file, err := os.Open(b.path(out))
	b.check(err)
	defer file.Close()
	lines := bufio.NewScanner(file)
	n := 0
	for ; lines.Scan(); n++ {
		token, err := jose.ParseSignedCompact(lines.Text(), []jose.SignatureAlgorithm{jose.ES256, jose.EdDSA})
		b.check(err)
		payload, err := token.Verify(b.public)
		if err != nil {
			b.t.Fatalf("token %d: %v", n+1, err)
		}
		if string(payload) != claimsOf(n) {
			b.t.Fatalf("token %d has the claims %s", n+1, payload)
		}
	}
	b.check(lines.Err())
	if n != b.tokens {
		b.t.Errorf("%d tokens, want %d", n, b.tokens)
	}
	if _, err := os.Stat(b.path(out) + batchfile.Suffix); !errors.Is(err, os.ErrNotExist) {
		b.t.Errorf("an unfinished output stands beside the finished one: %v", err)
	}
}

// Killed at random moments and resumed each time, a batch is what it would have
// been.
func TestChaosKillTheBatch(t *testing.T) {
	kills, tokens := 5, 3000
	if long() {
		kills, tokens = 50, 50_000
	}
	h := testhsm.NewDetached(t, "token")
	_, key, err := ed25519.GenerateKey(crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	testhsm.Import(t, h, key, "key", "01")
	b := newBatchTest(t, tokens, key.Public(), h.Env()...)
	b.succeeds(b.start("whole"))
	b.complete("whole")
	share := b.written("whole") / int64(kills)
	for n := range kills {
		p := b.start("killed", "--resume")
		target := b.written("killed") + rand.Int64N(share)
		for p.runs() && b.written("killed") < target {
			continue
		}
		p.kill()
		if status := p.cmd.ProcessState.ExitCode(); status > 0 {
			t.Fatalf("run %d ends with %d: %s", n, status, p.stderr.String())
		}
	}
	b.succeeds(b.start("killed", "--resume"))
	b.complete("killed")
	b.same("whole", "killed")
}

// same checks that two files are one.
func (b *batchTest) same(one, other string) {
	b.t.Helper()
	first, err := os.ReadFile(b.path(one))
	b.check(err)
	second, err := os.ReadFile(b.path(other))
	b.check(err)
	if !bytes.Equal(first, second) {
		b.t.Errorf("%s and %s differ", one, other)
	}
}

// Three HSMs of an active list and two of a passive one are killed, stopped and cut
// off under a batch, and the list is rewritten. None of it shows.
func TestChaosHSMsUnderABatch(t *testing.T) {
	tokens := 3000
	if long() {
		tokens = 100_000
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	var hsms []*testhsm.HSM
	for range 5 {
		h := testhsm.NewDetached(t, "fleet")
		testhsm.Import(t, h, key, "key", "01")
		hsms = append(hsms, h)
	}
	for name, disaster := range map[string]func(f *fleetTest){
		"one is killed": func(f *fleetTest) {
			f.servers[0].Kill()
			f.more()
			f.servers[0].Restart()
		},
		"the active list is killed": func(f *fleetTest) {
			for _, s := range f.servers[:3] {
				s.Kill()
			}
			f.more()
			for _, s := range f.servers[:3] {
				s.Restart()
			}
			f.more()
			for _, s := range f.servers[3:] {
				s.Kill()
			}
			f.more()
			for _, s := range f.servers[3:] {
				s.Restart()
			}
		},
		"one is stopped": func(f *fleetTest) {
			f.servers[1].Stop()
			f.more()
			f.servers[1].Continue()
		},
		"connections are cut": func(f *fleetTest) { f.proxy.Reset() },
		"the list is rewritten": func(f *fleetTest) {
			f.list(f.servers[2], f.servers[0])
			f.more()
			f.check(os.WriteFile(f.path("active"), []byte("garbage"), 0o600))
			f.more()
			f.list(f.servers[:3]...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFleetTest(t, tokens, hsms, &key.PublicKey)
			f.process = f.start("tokens")
			f.more()
			for f.process.runs() {
				disaster(f)
				f.more()
			}
			f.succeeds(f.process)
			f.complete("tokens")
		})
	}
}

// fleetTest is a batch over HSMs at addresses.
type fleetTest struct {
	*batchTest
	servers []*testhsm.Server
	process *batchProcess
	proxy   *testhsm.Proxy // in front of the first one
}

func newFleetTest(t *testing.T, tokens int, hsms []*testhsm.HSM, public crypto.PublicKey) *fleetTest {
	f := &fleetTest{batchTest: newBatchTest(t, tokens, public)}
	for _, h := range hsms {
		f.servers = append(f.servers, testhsm.Remote(t, h, "127.0.0.1:0"))
	}
	f.proxy = testhsm.NewProxy(t, "127.0.0.1:0", f.servers[0].Address)
	f.list(f.servers[:3]...)
	f.check(os.WriteFile(f.path("passive"), []byte(f.lines(f.servers[3:]...)), 0o600))
	f.check(os.WriteFile(f.path("pin"), []byte(testhsm.PIN), 0o600))
	f.env = append(f.env, "HSM_LOAD_BALANCE_LIST="+f.path("active")+":"+f.path("passive"), "HSM_PIN_FILE="+f.path("pin"),
		"HSM_LB_FILE_REFRESH_INTERVAL=1", "HSM_BALANCE_SUSPEND_TIME=1", "HSM_OP_TIMEOUT=2s")
	return f
}

// list makes servers the active list.
func (f *fleetTest) list(servers ...*testhsm.Server) {
	f.t.Helper()
	f.check(os.WriteFile(f.path("active.new"), []byte(f.lines(servers...)), 0o600))
	f.check(os.Rename(f.path("active.new"), f.path("active")))
}

// more waits until a good many tokens more are there, or it is over.
func (f *fleetTest) more() {
	want := f.written("tokens") + 200*200
	for f.process.runs() && f.written("tokens") < want {
		continue
	}
}

// lines are what a balance list says of servers.
func (f *fleetTest) lines(servers ...*testhsm.Server) string {
	var lines strings.Builder
	for _, s := range servers {
		address := s.Address
		if s == f.servers[0] {
			address = f.proxy.Address
		}
		lines.WriteString(testhsm.ListLine(address))
	}
	return lines.String()
}
