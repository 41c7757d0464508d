package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"syscall"
	"testing"

	"github.com/hsmkey/hsmkey/internal/testhsm"
)

// BenchmarkBatchMemory measures the peak memory of `hsmkey batch`. A million tokens
// are to take no more than 64 MiB, and no more than ten thousand and 8 MiB. It says
// nothing about that with the race detector.
func BenchmarkBatchMemory(b *testing.B) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	h := testhsm.NewDetached(b, "token")
	testhsm.Import(b, h, key, "key", "01")
	for _, tokens := range []int{10_000, 1_000_000} {
		b.Run(fmt.Sprintf("%d tokens", tokens), func(b *testing.B) {
			t := newBatchTest(b, tokens, &key.PublicKey, h.Env()...)
			peak := 0.0
			for n := 0; b.Loop(); n++ {
				p := t.start(fmt.Sprint("tokens-", n))
				t.succeeds(p)
				used := p.cmd.ProcessState.SysUsage().(*syscall.Rusage) //nolint:errcheck // what it is on every Unix
				peak = max(peak, float64(used.Maxrss)/1024)
			}
			b.ReportMetric(peak, "MiB")
		})
	}
}
