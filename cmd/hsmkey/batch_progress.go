package main

import (
	"fmt"
	"os"
	"time"
)

// progress shows a person how far a batch is, on a line that it draws anew. To others
// it does nothing.
type progress struct {
	terminal *os.File // nil: nobody looks
	lines    int      // of the input, -1: not known

	what  string // is being done; empty: nothing to show
	total int    // -1: not known
	from  int    // what was done when it began
	began time.Time
	drawn time.Time
}

// newProgress makes a progress that is shown if standard error is a terminal, and
// tokens do not run over it.
func (a *app) newProgress(input *batchInput, out string) *progress {
	terminal := asTerminal(a.stderr)
	if terminal == nil || out == "-" && asTerminal(a.stdout) != nil {
		return &progress{}
	}
	return &progress{terminal: terminal, lines: input.count()}
}

// check begins to show how tokens of earlier runs are looked at. How many there are
// is not known.
func (p *progress) check() { p.begin("checking", 0, -1) }

// sign begins to show how lines are signed of which some are done. These have no part
// in the rate and the remaining time.
func (p *progress) sign(done int) { p.begin("signing", done, p.lines) }

func (p *progress) begin(what string, from, total int) {
	p.clear()
	if p.terminal != nil {
		p.what, p.from, p.total = what, from, total
		p.began, p.drawn = time.Now(), time.Time{}
	}
}

// drawEvery is how often the line is drawn.
const drawEvery = 100 * time.Millisecond

func (p *progress) set(done int) {
	if p.what == "" {
		return
	}
	if now := time.Now(); now.Sub(p.drawn) >= drawEvery {
		p.drawn = now
		fmt.Fprint(p.terminal, clearLine+p.line(done, now)) // decoration: what it cannot show is nobody's loss
	}
}

func (p *progress) line(done int, now time.Time) string {
	line := fmt.Sprintf("%s: line %d", p.what, done)
	if p.total >= 0 {
		line += fmt.Sprintf(" of %d", p.total)
	}
	elapsed := now.Sub(p.began)
	if elapsed < drawEvery || done == p.from {
		return line
	}
	rate := float64(done-p.from) / elapsed.Seconds()
	line += fmt.Sprintf(", %.0f/s", rate)
	if p.total >= 0 {
		left := time.Duration(float64(max(p.total-done, 0)) / rate * float64(time.Second))
		line += fmt.Sprintf(", %v left", left.Round(time.Second))
	}
	return line
}

// clearLine goes to the beginning of the line and empties it (ECMA-48, EL).
const clearLine = "\r\x1b[K"

func (p *progress) clear() {
	if p.what != "" {
		fmt.Fprint(p.terminal, clearLine)
	}
}

func (p *progress) finish() {
	p.clear()
	p.what = ""
}
