package main

import (
	"context"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jws"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// benchFlags say what is measured.
type benchFlags struct {
	key      keyFlags
	alg      string
	sessions []int
	duration time.Duration
	compare  bool
	json     bool
}

func (a *app) benchCommand() *cobra.Command {
	var f benchFlags
	cmd := &cobra.Command{
		Use:   "bench --key LABEL [--sessions 1,2,4,8]",
		Short: "Measure how fast an HSM signs tokens",
		Long: `Signs tokens in 1, 2, 4 and 8 sessions at a time and prints how many there are in a
second, and how long one takes. The plateau is the fewest sessions that reach 95 %
of the best: more do not pay. --compare does the same with bare PKCS#11 calls on the
same token, taking turns, so that what is left is ours.`,
		Example: `  hsmkey key generate measured --type ec:P-256
  hsmkey bench --key measured --sessions 1,2 --duration 200ms --compare`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.bench(cmd.Context(), &f) },
	}
	f.key.register(cmd)
	flags := cmd.Flags()
	flags.StringVar(&f.alg, "alg", "", "algorithm (default: the key's)")
	flags.IntSliceVar(&f.sessions, "sessions", []int{1, 2, 4, 8}, "numbers of sessions to measure")
	flags.DurationVar(&f.duration, "duration", 2*time.Second, "how long to measure each")
	flags.BoolVar(&f.compare, "compare", false, "measure bare PKCS#11 calls beside")
	flags.BoolVar(&f.json, "json", false, "one JSON object")
	fixedCompletions(cmd, "alg", algorithms)
	return cmd
}

// Bounds of what is measured.
const (
	maxBenchDuration = time.Hour
	minBenchDuration = 10 * time.Millisecond
)

func (a *app) bench(ctx context.Context, f *benchFlags) error {
	query, err := f.key.query()
	if err != nil {
		return err
	}
	options := jws.Options{Type: "JWT"}
	if f.alg != "" {
		list, err := parseAlgorithms([]string{f.alg})
		if err != nil {
			return err
		}
		options.Algorithm = list[0]
	}
	for _, n := range f.sessions {
		if n < 1 || n > jws.MaxBatchSessions {
			return usagef("--sessions has %d, want numbers from 1 to %d", n, jws.MaxBatchSessions)
		}
	}
	if len(f.sessions) == 0 {
		return usagef("--sessions is empty")
	}
	if f.duration < minBenchDuration || f.duration > maxBenchDuration {
		return usagef("--duration is %v, want %v to %v", f.duration, minBenchDuration, maxBenchDuration)
	}
	config, err := a.config()
	if err != nil {
		return err
	}
	if config.Pool.MaxSessions == 0 {
		config.Pool.MaxSessions = slices.Max(f.sessions)
	}
	return a.with(ctx, config, closeSoon, func(h *hsmkey.HSM) error {
		key, err := h.Key(ctx, query)
		if err != nil {
			return err
		}
		signer, err := jws.NewSigner(key, options)
		if err != nil {
			return withHint(err, "`hsmkey key list` shows which algorithms each key signs with")
		}
		report, err := measure(ctx, f, h.Source(), key, signer)
		if err != nil {
			return err
		}
		if f.json {
			return a.printJSON(report)
		}
		return a.print(report.table(a.width()))
	})
}

// benchReport is what was measured.
type benchReport struct {
	Algorithm string     `json:"alg"`
	Key       string     `json:"key"`
	Plateau   int        `json:"plateau"` // sessions
	Rows      []benchRow `json:"rows"`
}

type benchRow struct {
	Sessions int      `json:"sessions"`
	Rate     float64  `json:"tokens_per_second"`
	P50      float64  `json:"p50_ms"`
	P90      float64  `json:"p90_ms"`
	P99      float64  `json:"p99_ms"`
	Bare     *float64 `json:"bare_per_second,omitempty"`
	Ratio    *float64 `json:"ours_to_bare,omitempty"` // the median of many
}

// best is the highest rate of all rows.
func (r *benchReport) best() float64 {
	best := 0.0
	for _, row := range r.Rows {
		best = max(best, row.Rate)
	}
	return best
}

// benchPayload is about what an access token says.
var benchPayload = []byte(`{"iss":"https://issuer.example","sub":"248289761001","aud":"client","iat":1700000000,"exp":1700003600,"jti":"01HF7YAT31RJNSNLVPR0"}`)

func measure(ctx context.Context, f *benchFlags, source sessionpool.Source, key *hsmkey.HSMJWK, signer *jws.Signer) (*benchReport, error) {
	report := &benchReport{Algorithm: string(signer.Algorithm()), Key: key.Label()}
	ways := []benchWay{func(ctx context.Context, more func() bool) error {
		for more() {
			if _, err := signer.Sign(ctx, benchPayload); err != nil {
				return err
			}
		}
		return nil
	}}
	if f.compare {
		ways = append(ways, func(ctx context.Context, more func() bool) error {
			return bareLoop(ctx, source, key, signer.Algorithm(), more)
		})
	}
	for _, n := range f.sessions {
		turns, err := takeTurns(ctx, n, f.duration, ways...)
		if err != nil {
			return nil, err
		}
		ours := joinTurns(turns[0])
		slices.Sort(ours.took)
		row := benchRow{Sessions: n, Rate: ours.rate(), P50: ours.percentile(50), P90: ours.percentile(90), P99: ours.percentile(99)}
		if f.compare {
			bare, ratio := joinTurns(turns[1]).rate(), medianRatio(turns[0], turns[1])
			row.Bare, row.Ratio = &bare, &ratio
		}
		report.Rows = append(report.Rows, row)
	}
	best := report.best()
	for _, row := range report.Rows {
		if row.Rate >= 0.95*best && (report.Plateau == 0 || row.Sessions < report.Plateau) {
			report.Plateau = row.Sessions
		}
	}
	return report, nil
}
