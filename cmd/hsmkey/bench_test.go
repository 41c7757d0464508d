package main

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestWaysThatAreComparedTakeTurns(t *testing.T) {
	var order []string
	way := func(name string, rounds int) benchWay {
		return func(_ context.Context, more func() bool) error {
			order = append(order, name)
			for range rounds + 1 {
				more()
			}
			return nil
		}
	}
	turns, err := takeTurns(context.Background(), 1, 3*turnTime, way("a", 1), way("b", 2))
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(order, ""); got != "abbaab" {
		t.Errorf("the order is %s", got)
	}
	for i, want := range []int{1, 2} {
		for _, turn := range turns[i] {
			if len(turns[i]) != 3 || len(turn.took) != want || turn.elapsed <= 0 {
				t.Errorf("way %d has %d turns, one of %d rounds in %v", i, len(turns[i]), len(turn.took), turn.elapsed)
			}
		}
	}
}

func TestARoundThatWaitsForASessionIsNotMeasuredBefore(t *testing.T) {
	first := make(chan struct{})
	turn, err := inParallel(context.Background(), 2, time.Hour, func(_ context.Context, more func() bool) error {
		select {
		case first <- struct{}{}: // the other one works, this one begins when all is over
			<-first
			more()
		case <-first:
			more()
			more()
			first <- struct{}{}
		}
		return nil
	})
	if err != nil || len(turn.took) != 1 || turn.elapsed != turn.took[0] {
		t.Errorf("one round of %v in %v: %v", turn.took, turn.elapsed, err)
	}
}

func TestOneTurnOfANoisyMachineDoesNotCount(t *testing.T) {
	turn := func(rounds int) benchTurn {
		return benchTurn{took: make([]time.Duration, rounds), elapsed: time.Second}
	}
	ours := []benchTurn{turn(90), turn(45), turn(900), turn(9), turn(90)}
	bare := []benchTurn{turn(100), turn(50), turn(100), turn(100), turn(100)}
	if got := medianRatio(ours, bare); got != 0.9 {
		t.Errorf("the ratio is %v, want 0.9", got)
	}
}

func TestTheTableFitsItsTerminal(t *testing.T) {
	bare, ratio := 26858.0, 0.97
	report := func(bare, ratio *float64) *benchReport {
		return &benchReport{Algorithm: "ES256", Key: "key", Plateau: 1024, Rows: []benchRow{
			{1, 15364, 0.058, 0.089, 0.137, bare, ratio}, {1024, 25022, 0.062, 0.171, 106.315, bare, ratio},
		}}
	}
	alone, compared := report(nil, nil), report(&bare, &ratio)
	for _, test := range []struct {
		report            *benchReport
		terminal, columns int
		bar               int
	}{
		{alone, 80, 80, 31}, {alone, 60, 60, 11}, {alone, 20, 59, 10}, {alone, 500, 89, 40},
		{compared, 80, 80, 14}, {compared, 20, 76, 10},
	} {
		lines := strings.Split(strings.TrimSuffix(string(test.report.table(test.terminal)), "\n"), "\n")
		lengths := make([]int, len(lines))
		for i, line := range lines {
			lengths[i] = utf8.RuneCountInString(line)
		}
		last := lines[len(lines)-1]
		if got, bar := slices.Max(lengths), strings.Count(last, "█"); got != test.columns || bar != test.bar || !strings.HasSuffix(last, plateauMark) {
			t.Errorf("for %d columns: %d, want %d, and a bar of %d, want %d:\n%s", test.terminal, got, test.columns, bar, test.bar, strings.Join(lines, "\n"))
		}
	}
}
