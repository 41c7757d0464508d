package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/hsmkey/hsmkey"
)

// results are those of one peer, one for each round.
type results struct {
	rates  []float64 // per second
	cpu    []float64 // microseconds of processor time for one
	cannot error
}

// compareAll measures every algorithm with every number of sessions and prints a
// table for each algorithm.
func compareAll(ctx context.Context, o options, peers []*process) error {
	fmt.Printf("Signatures a second on one SoftHSM2 token, and in relation to the C loop in the same round:\n"+
		"the median of %d rounds of %v, and in brackets the middle half of them.\n", o.rounds, o.slice)
	for _, alg := range algorithms {
		if len(o.only) > 0 && !slices.Contains(o.only, string(alg.name)) {
			continue
		}
		table := make([][]results, len(o.sessions))
		for i, sessions := range o.sessions {
			var err error
			if table[i], err = compare(ctx, o, peers, alg.name, sessions); err != nil {
				return err
			}
		}
		if err := printTable(o, peers, alg.name, table); err != nil {
			return err
		}
	}
	return nil
}

// compare lets the peers take turns. Each begins as often as the others.
func compare(ctx context.Context, o options, peers []*process, alg hsmkey.Algorithm, sessions int) ([]results, error) {
	all := make([]results, len(peers))
	for i, p := range peers { // sessions are opened and keys found before anything counts
		if _, err := p.measure(alg, sessions, 100*time.Millisecond); errors.Is(err, errCannot) {
			all[i].cannot = err
		} else if err != nil {
			return nil, err
		}
	}
	for round := range o.rounds {
		for turn := range peers {
			i := (round + turn) % len(peers)
			if all[i].cannot != nil {
				continue
			}
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			got, err := peers[i].measure(alg, sessions, o.slice)
			if err != nil {
				return nil, err
			}
			all[i].rates = append(all[i].rates, got.rate)
			all[i].cpu = append(all[i].cpu, float64(got.cpu)/float64(time.Microsecond))
		}
	}
	return all, nil
}

func printTable(o options, peers []*process, alg hsmkey.Algorithm, table [][]results) error {
	fmt.Println()
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "%s\t", alg)
	for _, sessions := range o.sessions {
		fmt.Fprintf(w, "%s\t/s\tratio\t\tµs\t", plural(sessions))
	}
	fmt.Fprintln(w)
	for i, p := range peers {
		fmt.Fprintf(w, "%s\t", p.name)
		for s := range o.sessions {
			r, c := table[s][i], table[s][0]
			if r.cannot != nil {
				fmt.Fprint(w, "\tcannot\t\t\t\t")
				continue
			}
			ratios := make([]float64, len(r.rates))
			for n := range ratios {
				ratios[n] = r.rates[n] / c.rates[n]
			}
			fmt.Fprintf(w, "\t%.0f\t%.3f\t[%.3f-%.3f]\t%.1f\t", quantile(r.rates, 0.5),
				quantile(ratios, 0.5), quantile(ratios, 0.25), quantile(ratios, 0.75), quantile(r.cpu, 0.5))
		}
		fmt.Fprintln(w)
	}
	return w.Flush()
}

func plural(sessions int) string {
	if sessions == 1 {
		return "1 session"
	}
	return fmt.Sprintf("%d sessions", sessions)
}

// quantile interpolates between the closest ranks.
func quantile(values []float64, q float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	at := q * float64(len(sorted)-1)
	low, part := int(at), at-math.Floor(at)
	if low+1 == len(sorted) {
		return sorted[low]
	}
	return sorted[low] + part*(sorted[low+1]-sorted[low])
}
