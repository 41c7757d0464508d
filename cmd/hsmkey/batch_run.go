package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/batchfile"
	"github.com/hsmkey/hsmkey/jws"
)

// batchRun is one run of the command.
type batchRun struct {
	app      *app
	flags    *batchFlags
	opts     jws.BatchOptions
	key      *hsmkey.HSMJWK
	signer   *jws.Signer
	claims   claimsMaker
	lines    *batchfile.Lines
	progress *progress
	out      *batchfile.Output // nil: standard output

	earlier  int // tokens of earlier runs
	signed   int
	skipped  int
	sessions int
	began    time.Time // to sign

	// The feeder's, while the batch goes on.
	next    batchfile.Line // the line to begin with
	nextErr error

	onTheWay lineNumbers // of the lines that the batch holds
}

func (r *batchRun) do(ctx context.Context) error {
	if r.flags.out != "-" {
		if err := r.openOutput(); err != nil {
			return err
		}
	}
	err := r.signAll(ctx)
	if err == nil || r.signed > 0 {
		r.summary()
	}
	return err
}

func (r *batchRun) openOutput() (err error) {
	if r.flags.resume {
		r.out, err = batchfile.Resume(r.flags.out)
	} else {
		r.out, err = batchfile.Create(r.flags.out)
	}
	if err != nil {
		return withHint(outputHint(fmt.Errorf("--out: %w", err)), "does the directory exist, and may you write there?")
	}
	return nil
}

// signAll signs what there is to sign, and sees to it that the output gets its
// name, or that what there is of it is kept.
func (r *batchRun) signAll(ctx context.Context) error {
	err := r.catchUp(ctx)
	caughtUp := err == nil
	if caughtUp {
		err = r.sign(ctx)
	}
	r.progress.finish()
	switch {
	case r.out == nil:
		return err
	case err == nil:
		return outputError(r.out.Finish())
	}
	kept, keepErr := r.out.Abandon()
	if kept != "" && caughtUp {
		r.app.note("%s has %s; --resume goes on from there", kept, counted(r.earlier+r.signed, "token"))
	}
	return errors.Join(err, outputError(keepErr))
}

func outputError(err error) error {
	if err == nil {
		return nil
	}
	return outputHint(fmt.Errorf("writing the output: %w", err))
}

// outputHint says what to do where the file of the output is not as it should be.
func outputHint(err error) error {
	switch {
	case errors.Is(err, batchfile.ErrNoFile):
		return withHint(err, "name a file, or - for standard output")
	case errors.Is(err, batchfile.ErrInUse):
		return withHint(err, "wait for the other run to end")
	case errors.Is(err, batchfile.ErrUnfinished):
		return withHint(err, "go on with --resume, or remove that file")
	case errors.Is(err, batchfile.ErrReplaced):
		return withHint(err, "its tokens are lost: run this again, and leave the file alone meanwhile")
	}
	return err
}

func inputError(err error) error { return fmt.Errorf("reading the input: %w", err) }

// sign signs the lines that are left.
func (r *batchRun) sign(ctx context.Context) error {
	r.began = time.Now()
	if r.out != nil {
		if r.out.Finished() && errors.Is(r.nextErr, io.EOF) {
			return nil
		}
		if err := r.out.Begin(); err != nil {
			return outputError(err)
		}
	}
	r.progress.sign(r.earlier + r.skipped)
	write, flush := r.writer()
	err := r.batch(ctx, write)
	return errors.Join(err, outputError(flush()))
}

// batch writes a token for each line that is left, with write.
func (r *batchRun) batch(ctx context.Context, write func(token string) error) error {
	// When this function returns nobody waits for input that may never come.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	fail := func(err error) error {
		cancel()
		return err
	}
	var inputErr error
	items := func(yield func([]byte) bool) { inputErr = r.feed(yield) }
	r.opts.Prepare, r.opts.OnSessions = r.prepare, func(n int) { r.sessions = n }
	for token, err := range r.signer.Batch(ctx, items, r.opts) {
		if item := (*jws.ItemError)(nil); errors.As(err, &item) {
			err = lineError(r.onTheWay.of(item.Index), item.Err)
			if r.opts.Skip {
				r.skip(err)
				r.onTheWay.pass()
				continue
			}
		}
		if err == nil {
			err = outputError(write(token))
		}
		if err != nil {
			return fail(err)
		}
		r.onTheWay.pass()
		r.signed++
		r.progress.set(r.earlier + r.signed + r.skipped)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return inputErr
}

// feed yields the texts of the lines that are left, nothing for one that is too
// long.
func (r *batchRun) feed(yield func([]byte) bool) error {
	for line, err := r.next, r.nextErr; ; line, err = r.lines.Next() {
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return inputError(err)
		}
		r.onTheWay.add(line.Number)
		if !yield(line.Text) {
			return nil
		}
	}
}

// prepare is the payload of a line.
func (r *batchRun) prepare(_ int, text []byte) ([]byte, error) {
	if len(text) == 0 {
		return nil, batchfile.TooLongError(batchfile.MaxLine)
	}
	return r.claims.make(text)
}

func (r *batchRun) skip(reason error) {
	r.skipped++
	r.progress.clear()
	r.app.note("skipped: %v", reason)
}

// writer returns what writes a token, and what writes all that is still held.
func (r *batchRun) writer() (write func(string) error, flush func() error) {
	if r.out != nil {
		return r.out.Write, func() error { return nil }
	}
	w := newEagerWriter(r.app.stdout)
	return w.line, w.close
}

// summary tells what was done.
func (r *batchRun) summary() {
	took := time.Since(r.began)
	text := fmt.Sprintf("signed %s in %v (%.0f/s)", counted(r.signed, "token"), took.Round(time.Millisecond), float64(r.signed)/max(took.Seconds(), 0.001))
	if r.sessions > 0 {
		text += " in " + counted(r.sessions, "session")
	}
	if r.earlier > 0 {
		text += fmt.Sprintf(", after %d of earlier runs", r.earlier)
	}
	if r.skipped > 0 {
		text += "; skipped " + counted(r.skipped, "line")
	}
	r.app.note("%s", text)
}

// counted is a number of things in words.
func counted(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}
