package sessionpool_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// BenchmarkOverhead is what the pool adds to a PKCS#11 call: acquire, Do and
// release around a call that does nothing. The target is 2 µs and 6
// allocations at one goroutine.
func BenchmarkOverhead(b *testing.B) {
	h := newHSM(b)
	h.cfg.OnEvent = nil
	p := h.pool(b, func(c *sessionpool.Config) { c.Wrap = nil })
	ctx := context.Background()
	nothing := func(sessionpool.Module, pkcs11.SessionHandle) error { return nil }
	once := func(b *testing.B) {
		s, err := p.Acquire(ctx)
		if err != nil {
			b.Fatal(err)
		}
		if err := s.Do(ctx, nothing); err != nil {
			b.Fatal(err)
		}
		s.Release()
	}
	b.Run("one goroutine", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			once(b)
		}
	})
	b.Run("eight goroutines", func(b *testing.B) {
		b.ReportAllocs()
		b.SetParallelism(4)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				once(b)
			}
		})
	})
}

// BenchmarkSessionsAddUp measures an HSM whose signature takes 1 ms: 16
// sessions are to deliver at least 15 times the signatures of one.
func BenchmarkSessionsAddUp(b *testing.B) {
	h := newHSM(b)
	h.cfg.OnEvent = nil
	p := h.pool(b)
	makeKey(b, p, "key")
	h.fault.Delay("C_Sign", time.Millisecond)
	h.fault.Answer("C_Sign")
	digest := make([]byte, 32)
	rate := func(sessions int) float64 {
		const each = 200
		start := time.Now()
		var group sync.WaitGroup
		for range sessions {
			group.Go(func() {
				for range each {
					s, err := p.Acquire(context.Background())
					if err != nil {
						b.Error(err)
						return
					}
					if _, err := sign(context.Background(), s, "key", digest); err != nil {
						b.Error(err)
					}
					s.Release()
				}
			})
		}
		group.Wait()
		return float64(sessions*each) / time.Since(start).Seconds()
	}
	var ratio float64
	for b.Loop() {
		ratio = rate(16) / rate(1)
	}
	b.ReportMetric(ratio, "x16/x1")
}
