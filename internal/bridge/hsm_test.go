package bridge_test

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"go.uber.org/goleak"

	"github.com/hsmkey/hsmkey/internal/bridge"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start runs a bridge that ends with the test.
func start(t *testing.T, config bridge.Config) *bridge.Bridge {
	t.Helper()
	b, err := bridge.Start(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

// clientOf returns a private copy of p11-kit's client library that speaks to the
// bridge instead of directly to the server.
func clientOf(t *testing.T, s *testhsm.Server, b *bridge.Bridge) (module string) {
	t.Helper()
	module = s.Client()
	t.Setenv("P11_KIT_SERVER_ADDRESS", b.ServerAddress())
	return module
}

// tool runs pkcs11-tool in a process of its own on the client library.
func tool(module string, args ...string) (string, error) {
	cmd := exec.Command("pkcs11-tool", append([]string{"--module", module}, args...)...)
	cmd.Env = append(os.Environ(), "PIN="+testhsm.PIN)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// load initialises the client library in this process and opens a session that
// is logged in.
func load(t *testing.T, module string) (*pkcs11.Ctx, pkcs11.SessionHandle) {
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
	return p, login(t, p)
}

func login(t *testing.T, p *pkcs11.Ctx) pkcs11.SessionHandle {
	t.Helper()
	slots, err := p.GetSlotList(true)
	if err != nil || len(slots) != 1 {
		t.Fatalf("slots: %v, %v", slots, err)
	}
	session, err := p.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Login(session, pkcs11.CKU_USER, testhsm.PIN); err != nil {
		t.Fatal(err)
	}
	return session
}

func loadTLS(t *testing.T, files *testhsm.TLSFiles) *tls.Config {
	t.Helper()
	config, err := bridge.LoadTLS(files.CA, files.ClientCert, files.ClientKey)
	if err != nil {
		t.Fatal(err)
	}
	return config
}

// signAndVerify signs with the key of id 01 by pkcs11-tool, reads its public key
// from the HSM itself, not through the bridge, and verifies.
func signAndVerify(t *testing.T, h *testhsm.HSM, module string) {
	t.Helper()
	dir := t.TempDir()
	digest := sha256.Sum256([]byte("a message"))
	in, out, pub := filepath.Join(dir, "in"), filepath.Join(dir, "out"), filepath.Join(dir, "pub")
	if err := os.WriteFile(in, digest[:], 0o600); err != nil {
		t.Fatal(err)
	}
	text, err := tool(module, "--login", "--pin", "env:PIN", "--sign", "--mechanism", "ECDSA", "--id", "01", "-i", in, "-o", out)
	if err != nil {
		t.Fatalf("pkcs11-tool: %v\n%s", err, text)
	}
	testhsm.PKCS11Tool(t, h, "--read-object", "--type", "pubkey", "--id", "01", "-o", pub)
	der, err := os.ReadFile(pub)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParsePKIXPublicKey(der)
	key, ok := parsed.(*ecdsa.PublicKey)
	if !ok {
		t.Fatalf("public key: %T, %v", parsed, err)
	}
	signature, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	half := len(signature) / 2
	r, s := new(big.Int).SetBytes(signature[:half]), new(big.Int).SetBytes(signature[half:])
	if !ecdsa.Verify(key, digest[:], r, s) {
		t.Errorf("the signature %s does not verify", hex.EncodeToString(signature))
	}
}

func TestAKeySignsAtATCPAddress(t *testing.T) {
	h := testhsm.NewDetached(t)
	testhsm.GenerateEC(t, h, "key", "01")
	s := testhsm.Remote(t, h, "127.0.0.2:0")
	b := start(t, bridge.Config{Address: s.Address})
	signAndVerify(t, h, clientOf(t, s, b))
	if stats := b.Stats(); stats.Connections == 0 || stats.Failures != 0 || stats.LastError != nil {
		t.Errorf("stats: %+v", stats)
	}
}

func TestAKeySignsOverTLSWithClientCertificates(t *testing.T) {
	h := testhsm.NewDetached(t)
	testhsm.GenerateEC(t, h, "key", "01")
	files := testhsm.NewTLSFiles(t)
	s := testhsm.RemoteTLS(t, h, "127.0.0.2:0", files)
	b := start(t, bridge.Config{Address: s.Address, TLS: loadTLS(t, files)})
	signAndVerify(t, h, clientOf(t, s, b))
}

func TestAServerThatCannotProveItselfIsRefused(t *testing.T) {
	files, others := testhsm.NewTLSFiles(t), testhsm.NewTLSFiles(t)
	elsewhere := testhsm.NewTLSFiles(t, "127.0.0.9")
	for _, test := range []struct {
		name    string
		server  *testhsm.TLSFiles
		trusted *testhsm.TLSFiles
		reason  any
	}{
		{"another CA", others, files, new(x509.UnknownAuthorityError)},
		{"another host", elsewhere, elsewhere, new(x509.HostnameError)},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := testhsm.RemoteTLS(t, testhsm.NewDetached(t), "127.0.0.2:0", test.server)
			b := start(t, bridge.Config{Address: s.Address, TLS: loadTLS(t, test.trusted)})
			// It reports CKR_DEVICE_ERROR or dies of SIGPIPE, which Go ignores for
			// the library and C does not.
			if out, err := tool(clientOf(t, s, b), "--list-slots"); err == nil {
				t.Errorf("connected: %s", out)
			}
			if stats := b.Stats(); stats.Failures == 0 || !errors.As(stats.LastError, test.reason) {
				t.Errorf("stats: %+v, want a %T", stats, test.reason)
			}
		})
	}
}

func TestARefusedClientCertificateIsReported(t *testing.T) {
	files, others := testhsm.NewTLSFiles(t), testhsm.NewTLSFiles(t)
	s := testhsm.RemoteTLS(t, testhsm.NewDetached(t), "127.0.0.2:0", files)
	config, err := bridge.LoadTLS(files.CA, others.ClientCert, others.ClientKey)
	if err != nil {
		t.Fatal(err)
	}
	b := start(t, bridge.Config{Address: s.Address, TLS: config})
	if out, err := tool(clientOf(t, s, b), "--list-slots"); err == nil {
		t.Errorf("let in: %s", out)
	}
	if err := b.Stats().LastError; err == nil || !strings.Contains(err.Error(), "unknown certificate authority") {
		t.Errorf("last error: %v", err)
	}
}

func TestACallFailsWhenItsServerDiesAndTheNextInitialiseConnectsAgain(t *testing.T) {
	for _, kind := range []string{"tcp", "tls"} {
		t.Run(kind, func(t *testing.T) {
			h := testhsm.NewDetached(t)
			var s *testhsm.Server
			var config bridge.Config
			if kind == "tls" {
				files := testhsm.NewTLSFiles(t)
				s = testhsm.RemoteTLS(t, h, "127.0.0.2:0", files)
				config.TLS = loadTLS(t, files)
			} else {
				s = testhsm.Remote(t, h, "127.0.0.2:0")
			}
			config.Address = s.Address
			b := start(t, config)
			p, session := load(t, clientOf(t, s, b))
			random := func() error {
				_, err := p.GenerateRandom(session, 16)
				return err
			}
			if err := random(); err != nil {
				t.Fatal(err)
			}

			// The server is stopped first, so that it surely does not answer.
			s.Stop()
			result := make(chan error, 1)
			go func() { result <- random() }()
			s.Kill()
			if err := <-result; !errors.Is(err, pkcs11.Error(pkcs11.CKR_DEVICE_ERROR)) {
				t.Errorf("call under way: %v, want CKR_DEVICE_ERROR", err)
			}
			if err := random(); !errors.Is(err, pkcs11.Error(pkcs11.CKR_DEVICE_ERROR)) {
				t.Errorf("next call: %v, want CKR_DEVICE_ERROR", err)
			}
			if b.Stats().LastError == nil {
				t.Error("the bridge knows of no failure")
			}

			s.Restart()
			if err := random(); !errors.Is(err, pkcs11.Error(pkcs11.CKR_DEVICE_ERROR)) {
				t.Errorf("before finalise: %v, want CKR_DEVICE_ERROR", err)
			}
			if err := p.Finalize(); err != nil {
				t.Fatal(err)
			}
			if err := p.Initialize(); err != nil {
				t.Fatal(err)
			}
			session = login(t, p)
			if err := random(); err != nil {
				t.Errorf("after initialise: %v", err)
			}
			if err := b.Stats().LastError; err != nil {
				t.Errorf("last error is still %v", err)
			}
		})
	}
}

func TestInitialiseFailsWhileTheServerIsDown(t *testing.T) {
	s := testhsm.Remote(t, testhsm.NewDetached(t), "127.0.0.2:0")
	b := start(t, bridge.Config{Address: s.Address})
	module := clientOf(t, s, b)
	s.Kill()
	p := pkcs11.New(module)
	defer p.Destroy()
	if err := p.Initialize(); !errors.Is(err, pkcs11.Error(pkcs11.CKR_DEVICE_ERROR)) {
		t.Errorf("C_Initialize: %v, want CKR_DEVICE_ERROR", err)
	}
	if err := b.Stats().LastError; err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("last error: %v", err)
	}
	s.Restart()
	if err := p.Initialize(); err != nil {
		t.Fatalf("after the restart: %v", err)
	}
	login(t, p)
	if err := p.Finalize(); err != nil {
		t.Error(err)
	}
}

func TestInitialiseFailsWhileTheServerIsStopped(t *testing.T) {
	s := testhsm.Remote(t, testhsm.NewDetached(t), "127.0.0.2:0")
	b := start(t, bridge.Config{Address: s.Address, DialTimeout: 100 * time.Millisecond})
	p := pkcs11.New(clientOf(t, s, b))
	defer p.Destroy()
	s.Stop() // the kernel still accepts connections for it
	if err := p.Initialize(); !errors.Is(err, pkcs11.Error(pkcs11.CKR_DEVICE_ERROR)) {
		t.Errorf("C_Initialize: %v, want CKR_DEVICE_ERROR", err)
	}
	if stats := b.Stats(); stats.Failures != 1 || !errors.Is(stats.LastError, os.ErrDeadlineExceeded) {
		t.Errorf("stats: %+v", stats)
	}
}

func TestPatienceIsForTheFirstAnswerOnly(t *testing.T) {
	const patience = time.Second
	s := testhsm.Remote(t, testhsm.NewDetached(t), "127.0.0.2:0")
	b := start(t, bridge.Config{Address: s.Address, DialTimeout: patience})
	p, session := load(t, clientOf(t, s, b))
	s.Stop()
	result := make(chan error, 1)
	go func() {
		_, err := p.GenerateRandom(session, 16)
		result <- err
	}()
	select {
	case err := <-result:
		t.Errorf("a stopped server answered: %v", err)
	case <-time.After(2 * patience):
	}
	s.Continue()
	if err := <-result; err != nil {
		t.Error(err)
	}
}

func TestDisconnectEndsACallThatHangs(t *testing.T) {
	s := testhsm.Remote(t, testhsm.NewDetached(t), "127.0.0.2:0")
	b := start(t, bridge.Config{Address: s.Address})
	p, session := load(t, clientOf(t, s, b))
	s.Stop()
	result := make(chan error, 1)
	go func() {
		_, err := p.GenerateRandom(session, 16)
		result <- err
	}()
	b.Disconnect()
	if err := <-result; !errors.Is(err, pkcs11.Error(pkcs11.CKR_DEVICE_ERROR)) {
		t.Errorf("call: %v, want CKR_DEVICE_ERROR", err)
	}
	s.Continue()
	if err := p.Finalize(); err != nil {
		t.Fatal(err)
	}
	if err := p.Initialize(); err != nil {
		t.Fatal(err)
	}
	login(t, p)
	if stats := b.Stats(); stats.Failures != 0 {
		t.Errorf("what was asked for counts as failure: %+v", stats)
	}
}

func TestOneBridgeServesSeveralClientsAtOnce(t *testing.T) {
	s := testhsm.Remote(t, testhsm.NewDetached(t), "127.0.0.2:0")
	b := start(t, bridge.Config{Address: s.Address})
	const clients = 4
	var group sync.WaitGroup
	for range clients {
		p, session := load(t, clientOf(t, s, b))
		group.Go(func() {
			for range 50 {
				if _, err := p.GenerateRandom(session, 16); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
	if stats := b.Stats(); stats.Active != clients || stats.Connections != clients {
		t.Errorf("stats: %+v, want %d connections", stats, clients)
	}
}

func TestABridgeLeadsElsewhereOnceItIsRedirected(t *testing.T) {
	one, other := testhsm.NewDetached(t, "one"), testhsm.NewDetached(t, "other")
	first := testhsm.Remote(t, one, "127.0.0.2:0")
	second := testhsm.Remote(t, other, "127.0.0.3:0")
	b := start(t, bridge.Config{Address: first.Address})
	p, session := load(t, clientOf(t, first, b))
	label := func() string {
		t.Helper()
		slots, err := p.GetSlotList(true)
		if err != nil || len(slots) != 1 {
			t.Fatalf("slots: %v, %v", slots, err)
		}
		info, err := p.GetTokenInfo(slots[0])
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimRight(info.Label, " ")
	}
	if got := label(); got != "one" {
		t.Errorf("token %q", got)
	}
	if err := b.Redirect(t.Context(), bridge.Config{Address: "10.0.0.1:4433"}); !errors.Is(err, sessionpool.ErrConfig) {
		t.Errorf("to a place where PINs must not travel: %v, want ErrConfig", err)
	}
	if _, err := p.GenerateRandom(session, 16); err != nil {
		t.Errorf("a redirection that was refused broke the connection: %v", err)
	}
	if err := b.Redirect(t.Context(), bridge.Config{Address: second.Address}); err != nil {
		t.Fatal(err)
	}
	if _, err := p.GenerateRandom(session, 16); !errors.Is(err, pkcs11.Error(pkcs11.CKR_DEVICE_ERROR)) {
		t.Errorf("on the old connection: %v, want CKR_DEVICE_ERROR", err)
	}
	if err := p.Finalize(); err != nil {
		t.Fatal(err)
	}
	if err := p.Initialize(); err != nil {
		t.Fatal(err)
	}
	if got := label(); got != "other" {
		t.Errorf("token %q, want the other one", got)
	}
	if stats := b.Stats(); stats.Failures != 0 || stats.LastError != nil {
		t.Errorf("what was asked for counts as failure: %+v", stats)
	}
}
