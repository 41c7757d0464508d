package main

import (
	"crypto/sha256"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/hsmkey/hsmkey/internal/testhsm"
)

// BenchmarkSignProcess is one token by `hsmkey sign` beside one signature by OpenSC's
// `pkcs11-tool --sign`, each a process from its beginning to its end. They take turns;
// the ratio is the median of all pairs.
func BenchmarkSignProcess(b *testing.B) {
	h := testhsm.NewDetached(b, "token")
	testhsm.GenerateEC(b, h, "ec", "01")
	testhsm.GenerateRSA(b, h, "rsa", "02")
	hsmkey := filepath.Join(b.TempDir(), "hsmkey")
	if out, err := exec.Command("go", "build", "-trimpath", "-o", hsmkey, ".").CombinedOutput(); err != nil {
		b.Fatalf("building hsmkey: %v: %s", err, out)
	}
	const claims = `{"sub":"alice"}`
	digest := sha256.Sum256([]byte(claims))
	for _, c := range []struct {
		name, key, id, mechanism string
		data                     []byte
	}{
		{"ES256", "ec", "01", "ECDSA", digest[:]},
		{"RS256", "rsa", "02", "SHA256-RSA-PKCS", []byte(claims)},
	} {
		b.Run(c.name, func(b *testing.B) {
			data := filepath.Join(b.TempDir(), "data")
			if err := os.WriteFile(data, c.data, 0o600); err != nil {
				b.Fatal(err)
			}
			run := func(program string, args ...string) benchTurn {
				cmd := exec.Command(program, args...)
				cmd.Env = append(os.Environ(), h.Env()...)
				began := time.Now()
				if err := cmd.Run(); err != nil {
					b.Fatalf("%s: %v", program, err)
				}
				took := time.Since(began)
				return benchTurn{took: []time.Duration{took}, elapsed: took}
			}
			var tool, ours []benchTurn
			for b.Loop() {
				tool = append(tool, run("pkcs11-tool", "--module", h.Module, "--token-label", "token", "--login", "--pin", "env:HSM_PIN",
					"--sign", "-m", c.mechanism, "--id", c.id, "-i", data, "-o", data+".sig"))
				ours = append(ours, run(hsmkey, "sign", "--key", c.key, "--claims", claims))
			}
			b.ReportMetric(medianRatio(tool, ours), "of-pkcs11-tool") // of rates, the other way round of times
			b.ReportMetric(0, "ns/op")
		})
	}
}
