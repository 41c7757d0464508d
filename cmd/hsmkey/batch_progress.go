package main

import (
	"os"
	"time"

	"github.com/schollz/progressbar/v3"
)

// progress shows a person how far a batch is. To others it does nothing.
type progress struct {
	terminal *os.File // nil: nobody looks
	lines    int      // of the input, -1: not known

	bar   *progressbar.ProgressBar
	from  int // what was done when the bar began
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

// The bar is decoration: what it cannot show is nobody's loss.

// check begins to show how tokens of earlier runs are looked at. How many there are
// is not known.
func (p *progress) check() { p.begin("checking", -1) }

// sign begins to show how lines are signed of which some are done. These have no part
// in the rate and the remaining time.
func (p *progress) sign(done int) {
	p.from = done
	left := -1
	if p.lines >= 0 {
		left = max(p.lines-done, 1)
	}
	p.begin("signing", left)
}

func (p *progress) begin(what string, total int) {
	if p.terminal == nil {
		return
	}
	p.finish()
	p.bar = progressbar.NewOptions(total,
		progressbar.OptionSetWriter(p.terminal),
		progressbar.OptionSetDescription(what),
		progressbar.OptionSetItsString("tokens"),
		progressbar.OptionShowIts(),
		progressbar.OptionShowCount(),
		progressbar.OptionSetPredictTime(true),
		progressbar.OptionFullWidth(),
		progressbar.OptionClearOnFinish(),
		progressbar.OptionSetSpinnerChangeInterval(0), // else it draws by itself, also when it is over
	)
	p.bar.StartWithoutRender()
	p.drawn = time.Time{}
}

// drawEvery is how often the bar is drawn.
const drawEvery = 100 * time.Millisecond

func (p *progress) set(done int) {
	if p.bar == nil {
		return
	}
	if now := time.Now(); now.Sub(p.drawn) >= drawEvery {
		p.drawn = now
		_ = p.bar.Set(done - p.from)
	}
}

func (p *progress) clear() {
	if p.bar != nil {
		_ = p.bar.Clear()
	}
}

func (p *progress) finish() {
	p.clear()
	p.bar = nil
}
