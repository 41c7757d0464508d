package main

import (
	"bufio"
	"io"
	"os"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

// eagerWriter writes lines in large pieces when they come fast, and soon when
// they come slowly.
type eagerWriter struct {
	mu    sync.Mutex
	w     *bufio.Writer
	timer *time.Timer
	err   error
}

// soon is how long a line may be held.
const soon = 50 * time.Millisecond

func newEagerWriter(to io.Writer) *eagerWriter {
	return &eagerWriter{w: bufio.NewWriterSize(to, 64<<10)}
}

func (e *eagerWriter) line(text string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.err != nil {
		return e.err
	}
	if e.w.Buffered() == 0 {
		e.timer = time.AfterFunc(soon, func() { _ = e.close() })
	}
	_, err := e.w.WriteString(text)
	if err == nil {
		err = e.w.WriteByte('\n')
	}
	return e.note(err)
}

// close writes what is held. The error stays for later lines.
func (e *eagerWriter) close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.timer != nil {
		e.timer.Stop()
	}
	return e.note(e.w.Flush())
}

func (e *eagerWriter) note(err error) error {
	if err != nil && e.err == nil {
		e.err = err
	}
	return e.err
}

// progress shows a person how far a batch is. To others it does nothing.
type progress struct {
	bar   *progressbar.ProgressBar // nil: nobody looks
	drawn time.Time
}

// newProgress makes a bar if standard error is a terminal. Of a file it knows how
// many lines there are to come.
func (a *app) newProgress(input *batchInput) *progress {
	terminal, ok := a.stderr.(*os.File)
	if !ok || !term.IsTerminal(int(terminal.Fd())) {
		return &progress{}
	}
	return &progress{bar: progressbar.NewOptions(input.count(),
		progressbar.OptionSetWriter(terminal),
		progressbar.OptionSetDescription("signing"),
		progressbar.OptionSetItsString("tokens"),
		progressbar.OptionShowIts(),
		progressbar.OptionShowCount(),
		progressbar.OptionSetPredictTime(true),
		progressbar.OptionFullWidth(),
		progressbar.OptionClearOnFinish(),
	)}
}

// drawEvery is how often the bar is drawn.
const drawEvery = 100 * time.Millisecond

// The bar is decoration: what it cannot show is nobody's loss.

func (p *progress) set(done int) {
	if p.bar == nil {
		return
	}
	if now := time.Now(); now.Sub(p.drawn) >= drawEvery {
		p.drawn = now
		_ = p.bar.Set(done)
	}
}

func (p *progress) clear() {
	if p.bar != nil {
		_ = p.bar.Clear()
	}
}

func (p *progress) finish() {
	if p.bar != nil {
		_ = p.bar.Clear()
		_ = p.bar.Exit()
	}
}
