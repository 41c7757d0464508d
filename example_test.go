package hsmkey_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"fmt"
	"log"
	"math/big"
	"time"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// The environment names the module, the token and the PIN: HSM_MODULE,
// HSM_TOKEN, HSM_PIN or HSM_PIN_FILE.
func Example() {
	ctx := context.Background()
	config, err := hsmkey.FromEnv()
	if err != nil {
		log.Fatal(err)
	}
	hsm, err := hsmkey.Open(ctx, config)
	if err != nil {
		log.Fatal(err)
	}
	defer hsm.Close(ctx)

	if _, err := hsm.Generate(ctx, "billing", hsmkey.P256, nil); err != nil {
		log.Fatal(err)
	}

	key, err := hsm.Key(ctx, hsmkey.Query{Label: "billing"})
	if err != nil {
		log.Fatal(err)
	}
	signingInput := []byte("eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9")
	signature, err := key.SignJWS(ctx, hsmkey.ES256, signingInput)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(key.Type(), key.Algorithms(), len(signature))
	// Output: ec:P-256 [ES256] 64
}

func ExampleHSM_Generate() {
	ctx := context.Background()
	hsm := openFromEnv(ctx)
	defer hsm.Close(ctx)

	key, err := hsm.Generate(ctx, "orders", hsmkey.Ed25519, []byte{0xca, 0xfe})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s %x %s\n", key.Label(), key.ID(), key.Type())

	_, err = hsm.Generate(ctx, "orders", hsmkey.P256, nil)
	fmt.Println(errors.Is(err, hsmkey.ErrExists))
	// Output:
	// orders cafe ed25519
	// true
}

func ExampleHSM_Import() {
	ctx := context.Background()
	hsm := openFromEnv(ctx)
	defer hsm.Close(ctx)

	// RFC 8037 appendix A.1.
	private, err := hsmkey.ParsePrivateKey([]byte(`-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g
-----END PRIVATE KEY-----`))
	if err != nil {
		log.Fatal(err)
	}
	key, err := hsm.Import(ctx, "rfc8037", private, nil)
	if err != nil {
		log.Fatal(err)
	}
	signature, err := key.SignJWS(ctx, hsmkey.EdDSA, []byte("eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc"))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(base64.RawURLEncoding.EncodeToString(signature))
	// Output: hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg
}

func ExampleHSM_Key() {
	ctx := context.Background()
	hsm := openFromEnv(ctx)
	defer hsm.Close(ctx)

	_, err := hsm.Key(ctx, hsmkey.Query{Label: "no such key"})
	fmt.Println(errors.Is(err, hsmkey.ErrKeyNotFound))
	fmt.Println(err)
	// Output:
	// true
	// key not found: no private or secret key with label "no such key" on token "example" (libsofthsm2.so)
}

func ExampleHSM_Keys() {
	ctx := context.Background()
	hsm := openFromEnv(ctx)
	defer hsm.Close(ctx)

	for label, typ := range map[string]hsmkey.KeyType{"list-ec": hsmkey.P384, "list-hmac": hsmkey.HMAC256} {
		if _, err := hsm.Generate(ctx, label, typ, nil); err != nil {
			log.Fatal(err)
		}
		defer hsm.Delete(ctx, hsmkey.Query{Label: label})
	}

	keys, err := hsm.Keys(ctx)
	if err != nil {
		log.Fatal(err)
	}
	for _, info := range keys {
		if info.Err != nil {
			fmt.Println(info.Label, "is of no use:", info.Err)
		} else if info.Label >= "list" && info.Label < "list~" {
			fmt.Println(info.Label, info.Key.Type(), info.Key.Algorithms())
		}
	}
	// Output:
	// list-ec ec:P-384 [ES384]
	// list-hmac hmac:256 [HS256]
}

// A key on the HSM signs a certificate, as any crypto.Signer does.
func ExampleHSMJWK_Sign() {
	ctx := context.Background()
	hsm := openFromEnv(ctx)
	defer hsm.Close(ctx)
	key, err := hsm.Generate(ctx, "server", hsmkey.P256, nil)
	if err != nil {
		log.Fatal(err)
	}

	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "server.example"},
		NotAfter:     time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		log.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(certificate.Subject, certificate.SignatureAlgorithm)
	// Output: CN=server.example ECDSA-SHA256
}

func ExampleHSMJWK_SignMessage() {
	ctx := context.Background()
	hsm := openFromEnv(ctx)
	defer hsm.Close(ctx)
	key, err := hsm.Generate(ctx, "messages", hsmkey.RSA2048, nil)
	if err != nil {
		log.Fatal(err)
	}

	// A time limit for an interface that takes no context.
	limited, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	message := []byte("to be signed")
	pss := &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: rsa.PSSSaltLengthEqualsHash}
	signature, err := key.WithContext(limited).SignMessage(nil, message, pss)
	if err != nil {
		log.Fatal(err)
	}

	public, ok := key.Public().(*rsa.PublicKey)
	if !ok {
		log.Fatal("not an RSA key")
	}
	digest := sha256.Sum256(message)
	fmt.Println(rsa.VerifyPSS(public, crypto.SHA256, digest[:], signature, pss))
	// Output: <nil>
}

// Many signatures in a row, all in one session.
func ExampleHSMJWK_In() {
	ctx := context.Background()
	hsm := openFromEnv(ctx)
	defer hsm.Close(ctx)
	key, err := hsm.Generate(ctx, "batch", hsmkey.P256, nil)
	if err != nil {
		log.Fatal(err)
	}

	session, err := hsm.Source().Acquire(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer session.Release()
	public, ok := key.Public().(*ecdsa.PublicKey)
	if !ok {
		log.Fatal("not an EC key")
	}
	pinned := key.In(session)
	valid := 0
	for i := range 100 {
		input := fmt.Appendf(nil, "message %d", i)
		signature, err := pinned.SignMessage(nil, input, crypto.SHA256)
		if err != nil {
			log.Fatal(err)
		}
		digest := sha256.Sum256(input)
		if ecdsa.VerifyASN1(public, digest[:], signature) {
			valid++
		}
	}
	fmt.Println(valid)
	// Output: 100
}

func ExampleHSMJWK_VerifyMAC() {
	ctx := context.Background()
	hsm := openFromEnv(ctx)
	defer hsm.Close(ctx)
	key, err := hsm.Generate(ctx, "secret", hsmkey.HMAC256, nil)
	if err != nil {
		log.Fatal(err)
	}

	mac, err := key.SignJWS(ctx, hsmkey.HS256, []byte("header.payload"))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(key.VerifyMAC(ctx, hsmkey.HS256, []byte("header.payload"), mac))
	err = key.VerifyMAC(ctx, hsmkey.HS256, []byte("header.forged"), mac)
	fmt.Println(errors.Is(err, hsmkey.ErrMAC))
	// Output:
	// <nil>
	// true
}

// A program that does one thing and ends.
func ExampleWithSession() {
	ctx := context.Background()
	config, err := hsmkey.FromEnv()
	if err != nil {
		log.Fatal(err)
	}
	err = hsmkey.WithSession(ctx, config, func(session *sessionpool.Session) error {
		fmt.Println(session.Token().Name())
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	// Output: token "example" (libsofthsm2.so)
}

// A key from a pool of sessions that the program made itself.
func ExampleFromHSM() {
	ctx := context.Background()
	config, err := hsmkey.FromEnv()
	if err != nil {
		log.Fatal(err)
	}
	config.Pool.MaxSessions = 4
	pool, err := sessionpool.New(config.Pool)
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close(ctx)

	_, err = hsmkey.FromHSM(ctx, pool, hsmkey.Query{ID: []byte{1, 2, 3}})
	fmt.Println(err)
	// Output: key not found: no private or secret key with id 010203 on token "example" (libsofthsm2.so)
}

func ExampleParseKeyType() {
	_, err := hsmkey.ParseKeyType("rsa:1024")
	fmt.Println(err)
	// Output: invalid input: key type "rsa:1024"; there is rsa:2048, rsa:3072, rsa:4096, ec:P-256, ec:P-384, ec:P-521, ed25519, hmac:256, hmac:384, hmac:512
}

// openFromEnv opens the HSM of the environment, for the other examples.
func openFromEnv(ctx context.Context) *hsmkey.HSM {
	config, err := hsmkey.FromEnv()
	if err != nil {
		log.Fatal(err)
	}
	hsm, err := hsmkey.Open(ctx, config)
	if err != nil {
		log.Fatal(err)
	}
	return hsm
}
