package testhsm

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TLSFiles are the paths of PEM files for mutual authentication. They live as
// long as the test.
type TLSFiles struct {
	CA                    string // certificate of the authority that signed both
	ServerCert, ServerKey string
	ClientCert, ClientKey string
}

// NewTLSFiles makes a certificate authority, a server certificate for the given
// host names and IP addresses (127.0.0.1 to 127.0.0.16 and ::1 without any) and
// for localhost, and a client certificate. Each call makes another authority.
func NewTLSFiles(tb testing.TB, hosts ...string) *TLSFiles {
	tb.Helper()
	if len(hosts) == 0 {
		hosts = []string{"::1"}
		for i := byte(1); i <= 16; i++ {
			hosts = append(hosts, net.IPv4(127, 0, 0, i).String())
		}
	}
	dir := tempDir(tb)
	ca := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "hsmkey test CA"},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	caKey := newKey(tb)
	server := &x509.Certificate{
		Subject:     pkix.Name{CommonName: "hsmkey test server"},
		DNSNames:    []string{"localhost"},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, host := range hosts {
		if ip := net.ParseIP(host); ip != nil {
			server.IPAddresses = append(server.IPAddresses, ip)
		} else {
			server.DNSNames = append(server.DNSNames, host)
		}
	}
	client := &x509.Certificate{
		Subject:     pkix.Name{CommonName: "hsmkey test client"},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}

	files := &TLSFiles{CA: filepath.Join(dir, "ca.pem")}
	ca = issue(tb, ca, ca, caKey.Public(), caKey)
	writePEM(tb, files.CA, "CERTIFICATE", ca.Raw)
	files.ServerCert, files.ServerKey = issueFiles(tb, dir, "server", server, ca, caKey)
	files.ClientCert, files.ClientKey = issueFiles(tb, dir, "client", client, ca, caKey)
	return files
}

// issueFiles makes a key and a certificate for it, and writes both.
func issueFiles(tb testing.TB, dir, name string, template, ca *x509.Certificate, caKey crypto.Signer) (certFile, keyFile string) {
	tb.Helper()
	key := newKey(tb)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		tb.Fatalf("testhsm: %v", err)
	}
	certFile, keyFile = filepath.Join(dir, name+".pem"), filepath.Join(dir, name+"-key.pem")
	writePEM(tb, certFile, "CERTIFICATE", issue(tb, template, ca, key.Public(), caKey).Raw)
	writePEM(tb, keyFile, "PRIVATE KEY", der)
	return certFile, keyFile
}

// issue signs a certificate that is valid for the day of the test.
func issue(tb testing.TB, template, parent *x509.Certificate, public crypto.PublicKey, signer crypto.Signer) *x509.Certificate {
	tb.Helper()
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		tb.Fatalf("testhsm: %v", err)
	}
	template.SerialNumber = serial
	template.NotBefore = time.Now().Add(-time.Hour)
	template.NotAfter = time.Now().Add(24 * time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, signer)
	if err != nil {
		tb.Fatalf("testhsm: %v", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatalf("testhsm: %v", err)
	}
	return cert
}

func newKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatalf("testhsm: %v", err)
	}
	return key
}

func writePEM(tb testing.TB, path, blockType string, der []byte) {
	tb.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: blockType, Bytes: der}), 0o600); err != nil {
		tb.Fatalf("testhsm: %v", err)
	}
}
