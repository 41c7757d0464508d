package main

import (
	"io"
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestMain makes this test binary the program hsmkey, too: tests start it as a
// process, by that name.
func TestMain(m *testing.M) {
	// The race detector lets each process that ends wait for a second, and here
	// hundreds do.
	if os.Getenv("GORACE") == "" {
		os.Setenv("GORACE", "atexit_sleep_ms=0") //nolint:errcheck // it costs time at most
	}
	testscript.Main(m, programs)
}

// programs are those that the test binary is, by their names.
var programs = map[string]func(){"hsmkey": observed}

// observed is main, with a copy of all output in the file TRANSCRIPT.
func observed() {
	path := os.Getenv("TRANSCRIPT")
	if path == "" {
		main()
	}
	transcript, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		panic(err)
	}
	os.Exit(process(io.MultiWriter(os.Stdout, transcript), io.MultiWriter(os.Stderr, transcript)))
}
