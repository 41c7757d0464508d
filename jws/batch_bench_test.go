package jws_test

import (
	"context"
	"fmt"
	"iter"
	"runtime"
	"testing"
	"time"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jws"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// copies yields the same claims n times; without limit when n is negative.
func copies(n int) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		for i := 0; i != n; i++ {
			if !yield(benchClaims) {
				return
			}
		}
	}
}

// BenchmarkBatchShare measures what a token of a batch costs beside the HSM: the
// module answers at once, from a decorator whose own work is in the figure. The
// target is 3 µs and 10 allocations.
func BenchmarkBatchShare(b *testing.B) {
	hsm, injector := faultyHSM(b, func(c *sessionpool.Config) { c.Direct = true })
	for _, typ := range []hsmkey.KeyType{hsmkey.P256, hsmkey.RSA2048, hsmkey.Ed25519} {
		signer := newSigner(b, generate(b, hsm, typ), jws.Options{})
		b.Run(string(typ), func(b *testing.B) {
			injector.Answer("C_Sign")
			defer injector.Clear()
			b.ReportAllocs()
			for _, err := range signer.Batch(context.Background(), copies(b.N), jws.BatchOptions{Sessions: 1}) {
				if err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkBatchOfAWaitingHSM measures an HSM whose signature takes 1 ms: 16
// sessions are to deliver at least 15000 tokens a second.
func BenchmarkBatchOfAWaitingHSM(b *testing.B) {
	hsm, injector := faultyHSM(b)
	signer := newSigner(b, generate(b, hsm, hsmkey.P256), jws.Options{})
	injector.Delay("C_Sign", time.Millisecond)
	injector.Answer("C_Sign")
	rate := 0.0
	for b.Loop() {
		rate = batchRate(b, signer, 16, time.Second)
	}
	b.ReportMetric(rate, "tokens/s")
	b.ReportMetric(0, "ns/op") // of a whole measurement: nobody wants to know
}

// BenchmarkAutomaticSessions measures how the number of sessions that a batch
// finds by itself compares with the best of the fixed ones: for SoftHSM2, which is
// bound by the processor, and for HSMs that take 1 ms and 5 ms. The target is 0.9,
// once it has settled.
func BenchmarkAutomaticSessions(b *testing.B) {
	for _, latency := range []time.Duration{0, time.Millisecond, 5 * time.Millisecond} {
		b.Run(fmt.Sprintf("latency=%v", latency), func(b *testing.B) {
			hsm, injector := faultyHSM(b, func(c *sessionpool.Config) {
				c.MaxSessions = 256
				if latency == 0 {
					c.Wrap = nil
				}
			})
			signer := newSigner(b, generate(b, hsm, hsmkey.P256), jws.Options{})
			if latency > 0 {
				injector.Delay("C_Sign", latency)
				injector.Answer("C_Sign")
			}
			var automatic, best float64
			var sessions int
			for b.Loop() {
				automatic, sessions = settledRate(b, signer)
				best = 0
				for n := 1; n <= 256; n *= 2 {
					best = max(best, batchRate(b, signer, n, time.Second))
				}
			}
			b.ReportMetric(automatic, "auto/s")
			b.ReportMetric(best, "best/s")
			b.ReportMetric(automatic/best, "auto:best")
			b.ReportMetric(float64(sessions), "sessions")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// batchRate is how many tokens a second come out of so many sessions.
func batchRate(b *testing.B, signer *jws.Signer, sessions int, d time.Duration) float64 {
	runtime.GC()
	start, count := time.Now(), 0
	for _, err := range signer.Batch(context.Background(), copies(-1), jws.BatchOptions{Sessions: sessions}) {
		if err != nil {
			b.Fatal(err)
		}
		if count++; time.Since(start) > d {
			break
		}
	}
	return float64(count) / time.Since(start).Seconds()
}

// settledRate is the same of a batch that finds the number by itself, over the
// third to the sixth second, and the number that it found.
func settledRate(b *testing.B, signer *jws.Signer) (rate float64, sessions int) {
	opts := jws.BatchOptions{OnSessions: func(n int) { sessions = n }}
	start, count := time.Now(), 0
	for _, err := range signer.Batch(context.Background(), copies(-1), opts) {
		if err != nil {
			b.Fatal(err)
		}
		passed := time.Since(start)
		if passed > 2*time.Second {
			count++
		}
		if passed > 6*time.Second {
			break
		}
	}
	return float64(count) / (time.Since(start) - 2*time.Second).Seconds(), sessions
}
