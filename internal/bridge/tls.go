package bridge

import (
	"crypto/tls"
	"crypto/x509"
	"os"
)

// LoadTLS reads what mutual authentication by TLS 1.3 needs, from PEM files: the
// certificates of the authorities that vouch for the HSM's host, and the client's
// own certificate (with intermediate ones, if any) and private key. All three are
// required: whoever can connect to a p11-kit server can use its token.
//
// Errors match [sessionpool.ErrConfig]; none quotes a file's content.
func LoadTLS(ca, cert, key string) (*tls.Config, error) {
	switch "" {
	case ca:
		return nil, configError("TLS needs the certificate of the authority (HSM_TLS_CA)")
	case cert:
		return nil, configError("TLS needs a client certificate (HSM_TLS_CERT)")
	case key:
		return nil, configError("TLS needs the private key of the client certificate (HSM_TLS_KEY)")
	}
	authorities, err := os.ReadFile(ca)
	if err != nil {
		return nil, configError("TLS authority: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(authorities) {
		return nil, configError("TLS authority: %s holds no certificate in PEM form", ca)
	}
	own, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, configError("TLS client certificate %s with key %s: %w", cert, key, err)
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		RootCAs:      roots,
		Certificates: []tls.Certificate{own},
	}, nil
}
