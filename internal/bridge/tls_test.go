package bridge_test

import (
	"crypto/tls"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hsmkey/hsmkey/internal/bridge"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

func TestFilesThatDoNotMakeMutualTLSAreRefused(t *testing.T) {
	files, others := testhsm.NewTLSFiles(t), testhsm.NewTLSFiles(t)
	dir := t.TempDir()
	garbage := filepath.Join(dir, "garbage")
	if err := os.WriteFile(garbage, []byte("no PEM"), 0o600); err != nil {
		t.Fatal(err)
	}
	missing := filepath.Join(dir, "missing")
	for _, test := range []struct{ name, ca, cert, key, names string }{
		{"no CA", "", files.ClientCert, files.ClientKey, "HSM_TLS_CA"},
		{"no certificate", files.CA, "", files.ClientKey, "HSM_TLS_CERT"},
		{"no key", files.CA, files.ClientCert, "", "HSM_TLS_KEY"},
		{"missing CA", missing, files.ClientCert, files.ClientKey, missing},
		{"missing certificate", files.CA, missing, files.ClientKey, missing},
		{"missing key", files.CA, files.ClientCert, missing, missing},
		{"garbage as CA", garbage, files.ClientCert, files.ClientKey, garbage},
		{"garbage as certificate", files.CA, garbage, files.ClientKey, garbage},
		{"garbage as key", files.CA, files.ClientCert, garbage, garbage},
		{"another key", files.CA, files.ClientCert, others.ClientKey, others.ClientKey},
		{"a directory", dir, files.ClientCert, files.ClientKey, dir},
	} {
		_, err := bridge.LoadTLS(test.ca, test.cert, test.key)
		if !errors.Is(err, sessionpool.ErrConfig) || !strings.Contains(err.Error(), test.names) {
			t.Errorf("%s: %v, want ErrConfig that names %s", test.name, err, test.names)
		}
	}
}

func TestAServerWithoutTLS13IsRefused(t *testing.T) {
	files := testhsm.NewTLSFiles(t)
	certificate, err := tls.LoadX509KeyPair(files.ServerCert, files.ServerKey)
	if err != nil {
		t.Fatal(err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{certificate}, MaxVersion: tls.VersionTLS12}
	address := hostOf(t, func(conn *net.TCPConn) {
		defer conn.Close()
		_ = tls.Server(conn, config).Handshake()
	})

	weak := loadTLS(t, files)
	weak.MinVersion = tls.VersionTLS12
	b := start(t, bridge.Config{Address: address, TLS: weak})
	if _, err := connect(t, b).Read(make([]byte, 1)); err == nil {
		t.Error("connected")
	}
	if err := b.Stats().LastError; err == nil || !strings.Contains(err.Error(), "protocol version") {
		t.Errorf("last error: %v", err)
	}
}
