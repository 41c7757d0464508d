package balance_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/balance"
	"github.com/hsmkey/hsmkey/internal/fault"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// inProcess is a fleet of tokens of one library in this process, each of which
// has the key.
func inProcess(tb testing.TB, n int) (*setup, *testhsm.HSM) {
	tb.Helper()
	labels := make([]string, n)
	var content strings.Builder
	for i := range labels {
		labels[i] = fmt.Sprintf("token-%d", i)
	}
	h := testhsm.New(tb, labels...)
	for _, label := range labels {
		one := *h
		one.Labels = []string{label}
		testhsm.Import(tb, &one, hsmKey(tb), "key", "01")
		content.WriteString(uri(h, label))
	}
	return remote(list(tb, content.String())), h
}

// BenchmarkAcquire is what the balancer adds to acquiring and releasing a
// session, beside a pool alone on the same token. The target is 500 ns.
func BenchmarkAcquire(b *testing.B) {
	ctx := context.Background()
	measure := func(b *testing.B, src sessionpool.Source) {
		once := func() {
			s, err := src.Acquire(ctx)
			if err != nil {
				b.Error(err)
				return
			}
			s.Release()
		}
		b.Run("one goroutine", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				once()
			}
		})
		b.Run("eight goroutines", func(b *testing.B) {
			b.ReportAllocs()
			b.SetParallelism(4)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					once()
				}
			})
		})
	}
	b.Run("pool", func(b *testing.B) {
		h := testhsm.New(b, "token")
		p, err := sessionpool.New(sessionpool.Config{Module: h.Module, TokenLabel: "token", PIN: sessionpool.StaticPIN(testhsm.PIN)})
		if err != nil {
			b.Fatal(err)
		}
		defer func() { _ = p.Close(ctx) }()
		measure(b, p)
	})
	for _, n := range []int{1, 3, balance.MaxEndpoints} {
		b.Run(fmt.Sprintf("balancer over %d", n), func(b *testing.B) {
			s, _ := inProcess(b, n)
			s.OnEvent = nil
			measure(b, s.open(b))
		})
	}
}

// BenchmarkEndpointsAddUp measures HSMs that need 1 ms for a signature and make
// one at a time: sixteen are to deliver at least 15 times the signatures of one.
func BenchmarkEndpointsAddUp(b *testing.B) {
	faults := fault.New()
	rate := func(endpoints int) float64 {
		s, _ := inProcess(b, endpoints)
		s.OnEvent = nil
		s.Pool.MaxSessions, s.Pool.Wrap = 1, faults.Wrap
		fleet := s.open(b)
		key := find(b, fleet, "key")
		faults.Delay("C_Sign", time.Millisecond)
		faults.Answer("C_Sign")
		defer faults.Clear()
		const each = 500
		sign := func(n int) {
			for range n {
				if _, err := key.SignJWS(context.Background(), hsmkey.ES256, []byte("a.b")); err != nil {
					b.Error(err)
				}
			}
		}
		sign(endpoints) // so that each has looked the key up
		start := time.Now()
		var group sync.WaitGroup
		for range endpoints {
			group.Go(func() { sign(each) })
		}
		group.Wait()
		return float64(endpoints*each) / time.Since(start).Seconds()
	}
	var ratios []float64
	for b.Loop() {
		ratios = append(ratios, rate(balance.MaxEndpoints)/rate(1))
	}
	slices.Sort(ratios)
	b.ReportMetric(ratios[len(ratios)/2], "x16/x1")
}
