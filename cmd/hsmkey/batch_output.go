package main

import (
	"bufio"
	"io"
	"sync"
	"time"
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
