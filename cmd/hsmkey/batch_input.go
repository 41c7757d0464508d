package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
)

// batchInput is the file that claims come from. To open and to read a pipe or a
// terminal may take for ever; a process that was asked to end does not wait for it.
type batchInput struct {
	ctx  context.Context
	file *os.File
}

// openInput opens a file, or takes standard input.
func (a *app) openInput(ctx context.Context, name string) (*batchInput, error) {
	if name == "-" {
		return &batchInput{ctx, a.stdin}, nil
	}
	file, err := await(ctx, func() (*os.File, error) { return os.Open(name) })
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, withHint(fmt.Errorf("--in: %w", err), "is the path right, and may you read the file?")
	}
	info, err := file.Stat()
	if err == nil && info.IsDir() {
		err = fmt.Errorf("%s is a directory", name)
	}
	if err != nil {
		return nil, withHint(fmt.Errorf("--in: %w", errors.Join(err, file.Close())), "name a file with one JSON object a line")
	}
	return &batchInput{ctx, file}, nil
}

// Read fails when the process is to end. Then a read that was left behind may still
// write to p.
func (i *batchInput) Read(p []byte) (int, error) {
	if err := i.ctx.Err(); err != nil {
		return 0, err
	}
	return await(i.ctx, func() (int, error) { return i.file.Read(p) })
}

func (i *batchInput) Close() error { return i.file.Close() }

// await returns what fn does, or leaves fn behind when ctx ends first.
func await[T any](ctx context.Context, fn func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		value, err := fn()
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}

// count returns how many lines there are, or -1 if that cannot be known before they
// are read.
func (i *batchInput) count() int {
	info, err := i.file.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return -1
	}
	at, err := i.file.Seek(0, io.SeekCurrent)
	if err != nil {
		return -1
	}
	count, err := countLines(i)
	if _, back := i.file.Seek(at, io.SeekStart); err != nil || back != nil {
		return -1 // what is wrong shows when the lines are read
	}
	return count
}

// countLines counts the lines that are left.
func countLines(input io.Reader) (int, error) {
	count, ended := 0, true
	for block := make([]byte, 256<<10); ; {
		n, err := input.Read(block)
		count += bytes.Count(block[:n], []byte{'\n'})
		if n > 0 {
			ended = bytes.HasSuffix(block[:n], []byte{'\n'})
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, err
		}
	}
	if !ended {
		count++
	}
	return count, nil
}
