package jws_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jws"
)

// vector is a token of a standard, with the private key or secret that signed it.
type vector struct {
	Source string          `json:"source"`
	Key    jose.JSONWebKey `json:"key"`
	Token  string          `json:"token"`
}

// parts returns the decoded header and payload, the signing input and the decoded
// signature.
func (v vector) parts(t *testing.T) (header, payload []byte, input string, signature []byte) {
	t.Helper()
	var decoded [3][]byte
	for i, part := range strings.Split(v.Token, ".") {
		var err error
		if decoded[i], err = base64.RawURLEncoding.DecodeString(part); err != nil {
			t.Fatal(err)
		}
	}
	return decoded[0], decoded[1], v.Token[:strings.LastIndexByte(v.Token, '.')], decoded[2]
}

func readVectors(t *testing.T) []vector {
	t.Helper()
	text, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []vector
	if err := json.Unmarshal(text, &vectors); err != nil {
		t.Fatal(err)
	}
	return vectors
}

// TestTheVectorsOfTheStandards imports the keys of RFC 7515, 7520 and 8037 into
// the HSM and takes their tokens through every path: verified in each format and,
// where the algorithm always gives the same signature, made again byte for byte.
func TestTheVectorsOfTheStandards(t *testing.T) {
	hsm := openHSM(t)
	made := make(map[hsmkey.Algorithm]int)
	for _, v := range readVectors(t) {
		t.Run(v.Source, func(t *testing.T) {
			key := importKey(t, hsm, v.Source, v.Key.Key)
			header, payload, input, signature := v.parts(t)
			var fields struct{ Alg, Kid string }
			if err := json.Unmarshal(header, &fields); err != nil {
				t.Fatal(err)
			}
			alg := hsmkey.Algorithm(fields.Alg)
			formats := inAllFormats(v.Token)

			verifier, err := jws.NewKeyVerifier(key, jws.VerifierOptions{Algorithms: []hsmkey.Algorithm{alg}})
			if err != nil {
				t.Fatal(err)
			}
			for format, token := range formats {
				verified, err := verifier.Verify(context.Background(), token)
				if err != nil {
					t.Errorf("%v: %v", format, err)
				} else if string(verified.Payload) != string(payload) || string(verified.Header.Raw) != string(header) {
					t.Errorf("%v: header %s, payload %s", format, verified.Header.Raw, verified.Payload)
				}
			}

			if !deterministic(alg) {
				return
			}
			made[alg]++
			if got, err := key.SignJWS(context.Background(), alg, []byte(input)); err != nil || string(got) != string(signature) {
				t.Errorf("the signature is %x, %v\nwant %x", got, err, signature)
			}
			if strings.ContainsAny(string(header), " \r\n") {
				return // RFC 7515 A.1 has line breaks in its header, which nobody else writes
			}
			signer, err := jws.NewSigner(key, jws.Options{Algorithm: alg, KeyID: fields.Kid, NoKeyID: fields.Kid == ""})
			if err != nil {
				t.Fatal(err)
			}
			for format, want := range formats {
				if got, err := signer.SignFormat(context.Background(), payload, format); err != nil || got != want {
					t.Errorf("%v: %s, %v\nwant %s", format, got, err, want)
				}
			}
			object, err := signer.Jose().Sign(payload)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := object.CompactSerialize(); err != nil || got != v.Token {
				t.Errorf("Jose(): %s, %v\nwant %s", got, err, v.Token)
			}
		})
	}
	for _, alg := range []hsmkey.Algorithm{hsmkey.RS256, hsmkey.EdDSA, hsmkey.HS256} {
		if made[alg] == 0 {
			t.Errorf("no vector for %s", alg)
		}
	}
}

// inAllFormats writes a compact token in each format (RFC 7515, section 7).
func inAllFormats(compact string) map[jws.Format]string {
	p := strings.Split(compact, ".")
	signature := `"protected":"` + p[0] + `","signature":"` + p[2] + `"`
	return map[jws.Format]string{
		jws.Compact:   compact,
		jws.Flattened: `{"payload":"` + p[1] + `",` + signature + `}`,
		jws.General:   `{"payload":"` + p[1] + `","signatures":[{` + signature + `}]}`,
	}
}

// deterministic reports whether the algorithm always gives the same signature.
func deterministic(alg hsmkey.Algorithm) bool {
	return alg == hsmkey.EdDSA || strings.HasPrefix(string(alg), "RS") || strings.HasPrefix(string(alg), "HS")
}
