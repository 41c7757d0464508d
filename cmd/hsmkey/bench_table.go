package main

import (
	"fmt"
	"strconv"
	"strings"
	"text/tabwriter"
	"unicode/utf8"
)

// The longest bar has as many columns as there is room for, within these bounds.
const (
	leastBar = 10
	mostBar  = 40
)

const plateauMark = " plateau"

// table is the report for people, for a terminal of a width.
func (r *benchReport) table(width int) []byte {
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 1, ' ', tabwriter.AlignRight)
	compare := r.Rows[0].Bare != nil
	fmt.Fprint(w, "SESSIONS\tTOKENS/S\tP50 MS\tP90 MS\tP99 MS\t")
	if compare {
		fmt.Fprint(w, "BARE/S\tOURS:BARE\t")
	}
	for _, row := range r.Rows {
		fmt.Fprintf(w, "\n%d\t%.0f\t%.3f\t%.3f\t%.3f\t", row.Sessions, row.Rate, row.P50, row.P90, row.P99)
		if compare {
			fmt.Fprintf(w, "%.0f\t%.2f\t", *row.Bare, *row.Ratio)
		}
	}
	fmt.Fprintln(w)
	_ = w.Flush() // into memory
	lines := strings.Split(strings.TrimSuffix(text.String(), "\n"), "\n")
	room := width - utf8.RuneCountInString(lines[0]) - len(" ") - len(plateauMark)
	longest := min(max(room, leastBar), mostBar)
	for i, row := range r.Rows {
		line := &lines[i+1]
		*line += " " + strings.Repeat("█", int(row.Rate/max(r.best(), 1)*float64(longest)))
		if row.Sessions == r.Plateau {
			*line += plateauMark
		}
	}
	title := r.Algorithm + " with " + strconv.Quote(plain(r.Key))
	return []byte(title + "\n" + strings.Join(lines, "\n") + "\n")
}
