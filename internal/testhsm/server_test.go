package testhsm_test

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hsmkey/hsmkey/internal/testhsm"
)

// kinds are the ways to serve an HSM; all must behave the same.
var kinds = []struct {
	name  string
	serve func(t *testing.T, h *testhsm.HSM) *testhsm.Server
}{
	{"unix", func(t *testing.T, h *testhsm.HSM) *testhsm.Server { return testhsm.Serve(t, h) }},
	{"tcp", func(t *testing.T, h *testhsm.HSM) *testhsm.Server { return testhsm.Remote(t, h, "127.0.0.2:0") }},
	{"tls", func(t *testing.T, h *testhsm.HSM) *testhsm.Server {
		return testhsm.RemoteTLS(t, h, "127.0.0.3:0", testhsm.NewTLSFiles(t))
	}},
}

func eachKind(t *testing.T, test func(t *testing.T, s *testhsm.Server)) {
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			test(t, kind.serve(t, testhsm.NewDetached(t, "served "+kind.name)))
		})
	}
}

func TestAServedTokenCanBeUsed(t *testing.T) {
	eachKind(t, func(t *testing.T, s *testhsm.Server) {
		p := load(t, s.Client())
		slots, err := p.GetSlotList(true)
		if err != nil || len(slots) != 1 {
			t.Fatalf("slots = %v, %v, want one", slots, err)
		}
		info, err := p.GetTokenInfo(slots[0])
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(info.Label, "served ") {
			t.Errorf("label = %q", info.Label)
		}
		login(t, p)
	})
}

func TestAStoppedServerHangsUntilItContinues(t *testing.T) {
	eachKind(t, func(t *testing.T, s *testhsm.Server) {
		p := load(t, s.Client())
		session := login(t, p)
		s.Stop()
		answered := make(chan error, 1)
		go func() {
			_, err := p.GenerateRandom(session, 16)
			answered <- err
		}()
		// The wait is no race: a stopped server cannot answer, however long it is.
		select {
		case err := <-answered:
			t.Errorf("a stopped server answered: %v", err)
		case <-time.After(50 * time.Millisecond):
		}
		s.Continue()
		if err := <-answered; err != nil {
			t.Errorf("after it continued: %v", err)
		}
	})
}

func TestAKilledServerFailsCallsAndServesNewClientsAfterItsRestart(t *testing.T) {
	eachKind(t, func(t *testing.T, s *testhsm.Server) {
		p := load(t, s.Client())
		session := login(t, p)
		s.Kill()
		s.Kill() // a dead one stays dead
		if _, err := p.GenerateRandom(session, 16); err == nil {
			t.Error("a killed server answered")
		}
		address := s.Address
		s.Restart()
		if s.Address != address {
			t.Errorf("restarted at %s, was %s", s.Address, address)
		}
		if err := p.Finalize(); err != nil {
			t.Fatal(err)
		}
		if err := p.Initialize(); err != nil {
			t.Fatal(err)
		}
		login(t, p)
	})
}

func TestAStoppedServerCanBeKilled(t *testing.T) {
	eachKind(t, func(_ *testing.T, s *testhsm.Server) {
		s.Stop()
		s.Kill()
	})
}

func TestTwoServersAreUsedSideBySide(t *testing.T) {
	var labels, modules []string
	for _, label := range []string{"north", "south"} {
		module := testhsm.Serve(t, testhsm.NewDetached(t, label)).Client()
		modules = append(modules, module)
		p := load(t, module)
		slots, err := p.GetSlotList(true)
		if err != nil || len(slots) != 1 {
			t.Fatalf("slots = %v, %v, want one", slots, err)
		}
		info, err := p.GetTokenInfo(slots[0])
		if err != nil {
			t.Fatal(err)
		}
		labels = append(labels, strings.TrimRight(info.Label, " "))
	}
	if !slices.Equal(labels, []string{"north", "south"}) {
		t.Errorf("labels = %q", labels)
	}
	// Whoever caches modules by their path must not take one for the other.
	if modules[0] == modules[1] {
		t.Errorf("both clients are %s", modules[0])
	}
}

func TestARemoteHSMListensOnIPv6(t *testing.T) {
	s := testhsm.Remote(t, testhsm.NewDetached(t), "[::1]:0")
	if host, _, err := net.SplitHostPort(s.Address); err != nil || host != "::1" {
		t.Errorf("address = %q", s.Address)
	}
	login(t, load(t, s.Client()))
}

// exchange connects to a TLS server and exchanges the protocol versions that a
// p11-kit connection begins with. Under TLS 1.3 the connecting itself proves
// nothing: the server's refusal arrives with the first read.
func exchange(address string, config *tls.Config) error {
	conn, err := tls.Dial("tcp", address, config)
	if err != nil {
		return err
	}
	defer conn.Close()
	version := []byte{0}
	if _, err := conn.Write(version); err != nil {
		return err
	}
	_, err = io.ReadFull(conn, version)
	return err
}

func TestATLSServerWantsACertificateOfItsCA(t *testing.T) {
	files, others := testhsm.NewTLSFiles(t), testhsm.NewTLSFiles(t)
	s := testhsm.RemoteTLS(t, testhsm.NewDetached(t), "127.0.0.2:0", files)

	ca, err := os.ReadFile(files.CA)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		t.Fatal("the CA's file holds no certificate")
	}
	good, err := tls.LoadX509KeyPair(files.ClientCert, files.ClientKey)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := tls.LoadX509KeyPair(others.ClientCert, others.ClientKey)
	if err != nil {
		t.Fatal(err)
	}

	if err := exchange(s.Address, &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{good}}); err != nil {
		t.Errorf("with a certificate of the CA: %v", err)
	}
	for name, config := range map[string]*tls.Config{
		"without a certificate":              {RootCAs: roots},
		"with a certificate of another CA":   {RootCAs: roots, Certificates: []tls.Certificate{foreign}},
		"with TLS 1.2":                       {RootCAs: roots, Certificates: []tls.Certificate{good}, MaxVersion: tls.VersionTLS12},
		"expecting another CA's certificate": {RootCAs: x509.NewCertPool(), Certificates: []tls.Certificate{good}},
	} {
		if err := exchange(s.Address, config); err == nil {
			t.Errorf("%s: let in", name)
		}
	}
}

// SoftHSM2 that is killed during a login leaves an empty file behind.
func TestAKilledServerLosesNoToken(t *testing.T) {
	h := testhsm.NewDetached(t)
	s := testhsm.Remote(t, h, "127.0.0.2:0")
	paths, err := filepath.Glob(filepath.Join(h.Dir, "tokens", "*", "token.object"))
	if err != nil || len(paths) != 1 {
		t.Fatalf("token files %v, %v", paths, err)
	}
	if err := os.Truncate(paths[0], 0); err != nil {
		t.Fatal(err)
	}
	s.Restart()
	login(t, load(t, s.Client()))
}
