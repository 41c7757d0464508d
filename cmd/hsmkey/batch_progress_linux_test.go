package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestABatchOnATerminalShowsHowFarItIs(t *testing.T) {
	dir, pin := newToken(t)
	t.Setenv("HSM_PIN", pin)
	generate := exec.Command("hsmkey", "key", "generate", "demo", "--type", "rsa:2048")
	generate.Dir = dir
	if out, err := generate.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	claims := strings.Repeat("{}\n", 2000)
	if err := os.WriteFile(filepath.Join(dir, "claims.jsonl"), []byte(claims), 0o600); err != nil {
		t.Fatal(err)
	}
	term, cmd := runOnTerminal(t, dir, "hsmkey", "batch", "--key", "demo", "--in", "claims.jsonl", "--out", "tokens.txt")
	term.waitFor("signed ")
	term.waitFor(" of 2000 tokens, ")
	term.waitFor("/s")
	term.waitFor(" left")
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	tokens, err := os.ReadFile(filepath.Join(dir, "tokens.txt"))
	if n := strings.Count(string(tokens), "\n"); err != nil || n != 2000 {
		t.Errorf("%d tokens, %v", n, err)
	}
	for _, shown := range strings.Split(term.all.String(), clearLine) {
		if len(shown) > columns {
			t.Errorf("%q does not fit on a line", shown)
		}
	}
}

func TestTheLineOfProgressTellsRateAndRemainingTime(t *testing.T) {
	p := progress{what: "signed", total: 1000, from: 100}
	for _, c := range []struct {
		total, done int
		want        string
	}{
		{1000, 350, "signed 350 of 1000 tokens, 50/s, 13s left"},
		{1000, 100, "signed 100 of 1000 tokens, 0/s"},
		{100, 350, "signed 350 of 100 tokens, 50/s, 0s left"}, // the input grew
		{-1, 350, "signed 350 tokens, 50/s"},
	} {
		p.total = c.total
		if got := p.line(c.done, p.began.Add(5*time.Second)); got != c.want {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}
