package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"github.com/hsmkey/hsmkey/internal/batchfile"
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
		e.err = fmt.Errorf("writing the output: %w", err)
	}
	return e.err
}

// progress shows a person how far a batch is. To others it does nothing.
type progress struct{ bar *progressbar.ProgressBar }

// newProgress makes a bar if standard error is a terminal. Of a file it knows how
// many lines there are to come.
func (a *app) newProgress(input *os.File) *progress {
	terminal, ok := a.stderr.(*os.File)
	if !ok || !term.IsTerminal(int(terminal.Fd())) {
		return &progress{}
	}
	total := -1
	if info, err := input.Stat(); err == nil && info.Mode().IsRegular() {
		if n, err := countLines(input); err == nil {
			total = n
		}
	}
	return &progress{progressbar.NewOptions(total,
		progressbar.OptionSetWriter(terminal),
		progressbar.OptionSetDescription("signing"),
		progressbar.OptionSetItsString("tokens"),
		progressbar.OptionShowIts(),
		progressbar.OptionShowCount(),
		progressbar.OptionSetPredictTime(true),
		progressbar.OptionFullWidth(),
		progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionClearOnFinish(),
	)}
}

// countLines reads a file once over, from where it stands and back.
func countLines(file *os.File) (int, error) {
	at, err := file.Seek(0, io.SeekCurrent)
	if err != nil {
		return 0, err
	}
	n, err := batchfile.Count(file)
	if err != nil {
		return 0, err
	}
	_, err = file.Seek(at, io.SeekStart)
	return n, err
}

// The bar is decoration: what it cannot show is nobody's loss.

func (p *progress) set(done int) {
	if p.bar != nil {
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
