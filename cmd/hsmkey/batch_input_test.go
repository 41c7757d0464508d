package main

import (
	"context"
	"errors"
	"path/filepath"
	"syscall"
	"testing"
)

func TestAPipeThatNobodyWritesToKeepsNobody(t *testing.T) {
	name := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(name, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	opened := make(chan error, 1)
	go func() {
		_, err := (&app{}).openInput(ctx, name)
		opened <- err
	}()
	cancel()
	if err := <-opened; !errors.Is(err, context.Canceled) {
		t.Errorf("openInput = %v, want context.Canceled", err)
	}
}
