package hsmkey_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"testing"
	"time"

	"github.com/hsmkey/hsmkey"
)

// verifyGo checks a signature as Go's crypto packages make it.
func verifyGo(public crypto.PublicKey, opts crypto.SignerOpts, message, signature []byte) error {
	var digest []byte
	if hash := opts.HashFunc(); hash != 0 {
		h := hash.New()
		h.Write(message)
		digest = h.Sum(nil)
	}
	ok := false
	switch public := public.(type) {
	case *rsa.PublicKey:
		if pss, isPSS := opts.(*rsa.PSSOptions); isPSS {
			return rsa.VerifyPSS(public, opts.HashFunc(), digest, signature, pss)
		}
		return rsa.VerifyPKCS1v15(public, opts.HashFunc(), digest, signature)
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(public, digest, signature)
	case ed25519.PublicKey:
		ok = ed25519.Verify(public, message, signature)
	}
	if !ok {
		return errors.New("the signature is wrong")
	}
	return nil
}

func TestAKeyIsACryptoSigner(t *testing.T) {
	h := newHSM(t)
	message := []byte("any message")
	hashes := []crypto.SignerOpts{crypto.SHA256, crypto.SHA384, crypto.SHA512}
	var pss []crypto.SignerOpts
	for _, hash := range []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512} {
		for _, salt := range []int{rsa.PSSSaltLengthEqualsHash, rsa.PSSSaltLengthAuto, hash.Size(), 8, 256 - hash.Size() - 2} {
			pss = append(pss, &rsa.PSSOptions{Hash: hash, SaltLength: salt})
		}
	}
	for typ, all := range map[hsmkey.KeyType][]crypto.SignerOpts{
		hsmkey.RSA2048: append(pss, hashes...),
		hsmkey.P256:    hashes,
		hsmkey.P384:    hashes,
		hsmkey.P521:    hashes,
		hsmkey.Ed25519: {crypto.Hash(0), &ed25519.Options{}},
	} {
		key := generate(t, h, string(typ), typ)
		for _, opts := range all {
			digest := message
			if hash := opts.HashFunc(); hash != 0 {
				d := hash.New()
				d.Write(message)
				digest = d.Sum(nil)
			}
			signature, err := key.Sign(rand.Reader, digest, opts)
			if err != nil {
				t.Errorf("%s, %v: Sign: %v", typ, opts, err)
			} else if err := verifyGo(key.Public(), opts, message, signature); err != nil {
				t.Errorf("%s, %v: Sign: %v", typ, opts, err)
			}
			signature, err = key.SignMessage(nil, message, opts)
			if err != nil {
				t.Errorf("%s, %v: SignMessage: %v", typ, opts, err)
			} else if err := verifyGo(key.Public(), opts, message, signature); err != nil {
				t.Errorf("%s, %v: SignMessage: %v", typ, opts, err)
			}
		}
	}
}

func TestTheAutomaticSaltIsAsLongAsTheHash(t *testing.T) {
	key := generate(t, newHSM(t), "key", hsmkey.RSA2048)
	digest := make([]byte, 32)
	signature, err := key.Sign(nil, digest, &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: rsa.PSSSaltLengthAuto})
	if err != nil {
		t.Fatal(err)
	}
	strict := &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}
	if err := rsa.VerifyPSS(as[*rsa.PublicKey](key.Public()), crypto.SHA256, digest, signature, strict); err != nil {
		t.Error(err)
	}
}

func TestOptionsThatDoNotFitAreRefused(t *testing.T) {
	h := newHSM(t)
	rsaKey, ecKey := generate(t, h, "rsa", hsmkey.RSA2048), generate(t, h, "ec", hsmkey.P256)
	edKey, secret := generate(t, h, "ed", hsmkey.Ed25519), generate(t, h, "hmac", hsmkey.HMAC256)
	for _, test := range []struct {
		name   string
		key    *hsmkey.HSMJWK
		digest int
		opts   crypto.SignerOpts
		want   error
	}{
		{"no options", rsaKey, 32, nil, hsmkey.ErrInvalid},
		{"no options", edKey, 32, nil, hsmkey.ErrInvalid},
		{"no hash", rsaKey, 32, crypto.Hash(0), hsmkey.ErrUnsupported},
		{"no hash", ecKey, 32, crypto.Hash(0), hsmkey.ErrUnsupported},
		{"SHA-1", rsaKey, 20, crypto.SHA1, hsmkey.ErrUnsupported},
		{"an unknown hash", ecKey, 20, crypto.Hash(99), hsmkey.ErrUnsupported},
		{"a short digest", rsaKey, 31, crypto.SHA256, hsmkey.ErrInvalid},
		{"a long digest", ecKey, 33, crypto.SHA256, hsmkey.ErrInvalid},
		{"an empty digest", ecKey, 0, crypto.SHA256, hsmkey.ErrInvalid},
		{"a salt of -3 bytes", rsaKey, 32, &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: -3}, hsmkey.ErrInvalid},
		{"an enormous salt", rsaKey, 32, &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: 1 << 40}, hsmkey.ErrInvalid},
		{"a salt that just does not fit", rsaKey, 32, &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: 223}, hsmkey.ErrInvalid},
		{"a hash for Ed25519", edKey, 64, crypto.SHA512, hsmkey.ErrUnsupported},
		{"Ed25519ph", edKey, 64, &ed25519.Options{Hash: crypto.SHA512}, hsmkey.ErrUnsupported},
		{"Ed25519ctx", edKey, 32, &ed25519.Options{Context: "x"}, hsmkey.ErrUnsupported},
		{"an HMAC key", secret, 32, crypto.SHA256, hsmkey.ErrUnsupported},
	} {
		if signature, err := test.key.Sign(nil, make([]byte, test.digest), test.opts); !errors.Is(err, test.want) || signature != nil {
			t.Errorf("%s with %s: Sign = %v, want %v", test.name, test.key.Type(), err, test.want)
		}
	}
	if _, err := rsaKey.SignMessage(nil, nil, crypto.Hash(0)); !errors.Is(err, hsmkey.ErrUnsupported) {
		t.Errorf("SignMessage without a hash = %v, want ErrUnsupported", err)
	}
	for _, key := range []*hsmkey.HSMJWK{rsaKey, ecKey, edKey, secret} {
		signOnce(t, key)
	}
}

// The whole of Go's TLS is a test of a crypto.Signer.
func TestAKeyServesTLS(t *testing.T) {
	h := newHSM(t)
	for _, typ := range []hsmkey.KeyType{hsmkey.RSA2048, hsmkey.P256, hsmkey.P384, hsmkey.P521, hsmkey.Ed25519} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			t.Run(fmt.Sprintf("%s %s", typ, tls.VersionName(version)), func(t *testing.T) {
				key, err := h.Key(context.Background(), hsmkey.Query{Label: string(typ)})
				if errors.Is(err, hsmkey.ErrKeyNotFound) {
					key = generate(t, h, string(typ), typ)
				} else if err != nil {
					t.Fatal(err)
				}
				if err := handshake(key, version); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// handshake shakes hands with a server whose private key is on the HSM.
func handshake(key *hsmkey.HSMJWK, version uint16) error {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, DNSNames: []string{"test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AddCert(certificate)
	near, far := net.Pipe()
	server := tls.Server(near, &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
		MinVersion:   version, MaxVersion: version, SessionTicketsDisabled: true,
	})
	client := tls.Client(far, &tls.Config{RootCAs: roots, ServerName: "test"})
	served := make(chan error, 1)
	go func() {
		_, err := io.WriteString(server, "hello")
		served <- errors.Join(err, near.Close())
	}()
	got, err := io.ReadAll(client)
	err = errors.Join(err, far.Close(), <-served)
	if err == nil && string(got) != "hello" {
		err = fmt.Errorf("read %q", got)
	}
	if errors.Is(err, io.ErrUnexpectedEOF) && string(got) == "hello" {
		err = nil // the pipe was closed without a farewell
	}
	return err
}
