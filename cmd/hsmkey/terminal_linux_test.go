package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// batchOnTerminal makes a key and a file of three claims, and runs a batch of them on
// a terminal.
func batchOnTerminal(t *testing.T, before string, args ...string) (dir string, term *terminal) {
	t.Helper()
	dir, pin := newToken(t)
	t.Setenv("HSM_PIN", pin)
	shell(t, dir, `hsmkey key generate key --type ed25519
		printf '{"n":%d}\n' 1 2 3 > claims.jsonl
		`+before)
	term, cmd := runOnTerminal(t, dir, "hsmkey", append([]string{"batch", "--key", "key", "--in", "claims.jsonl"}, args...)...)
	t.Cleanup(func() {
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	return dir, term
}

func TestTokensOnATerminalAreNotMixedWithProgress(t *testing.T) {
	dir, term := batchOnTerminal(t, "hsmkey batch --key key --in claims.jsonl --out tokens")
	term.waitFor("signed 3 tokens")
	tokens, err := os.ReadFile(filepath.Join(dir, "tokens"))
	if err != nil {
		t.Fatal(err)
	}
	shown, _, _ := strings.Cut(strings.ReplaceAll(term.all.String(), "\r\n", "\n"), "signed 3 tokens")
	if shown != string(tokens) {
		t.Errorf("the terminal shows %q, the tokens are %q", shown, tokens)
	}
}

func TestProgressOfAResumedBatchGoesOnFromWhereItWas(t *testing.T) {
	_, term := batchOnTerminal(t, "head -n 1 claims.jsonl | hsmkey batch --key key --out tokens", "--out", "tokens", "--resume")
	term.waitFor("checking: line 1" + clearLine)
	term.waitFor("signing: line 2 of 3" + clearLine)
	term.waitFor("signed 2 tokens")
}

func TestABatchOnATerminalShowsRateAndRemainingTime(t *testing.T) {
	dir, term := batchOnTerminal(t, `seq 20000 | sed 's/.*/{"n":&}/' > claims.jsonl`, "--out", "tokens")
	term.waitFor(" of 20000, ")
	term.waitFor("/s, ")
	term.waitFor(" left")
	term.waitFor("signed 20000 tokens in")
	for _, shown := range strings.Split(term.all.String(), clearLine) {
		if len(shown) > columns {
			t.Errorf("%q does not fit on a line", shown)
		}
	}
	tokens, err := os.ReadFile(filepath.Join(dir, "tokens"))
	if n := strings.Count(string(tokens), "\n"); err != nil || n != 20000 {
		t.Errorf("%d tokens, %v", n, err)
	}
}

func TestRateAndRemainingTimeAreOfThisRun(t *testing.T) {
	for _, c := range []struct {
		total, done int
		after       time.Duration
		want        string
	}{
		{1000, 350, 5 * time.Second, "signing: line 350 of 1000, 50/s, 13s left"},
		{1000, 100, 5 * time.Second, "signing: line 100 of 1000"},
		{1000, 101, time.Millisecond, "signing: line 101 of 1000"},
		{100, 350, 5 * time.Second, "signing: line 350 of 100, 50/s, 0s left"}, // the input grew
		{-1, 350, 5 * time.Second, "signing: line 350, 50/s"},
	} {
		p := progress{what: "signing", total: c.total, from: 100}
		if got := p.line(c.done, p.began.Add(c.after)); got != c.want {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}

func TestTheTableIsAsWideAsTheTerminal(t *testing.T) {
	dir, pin := newToken(t)
	t.Setenv("HSM_PIN", pin)
	shell(t, dir, "hsmkey key generate key --type ed25519")
	term, cmd := runOnTerminal(t, dir, "hsmkey", "bench", "--key", "key", "--sessions", "1", "--duration", "10ms")
	term.waitFor("plateau\r\n")
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	lines := strings.Split(term.all.String(), "\r\n")
	if last := lines[len(lines)-2]; utf8.RuneCountInString(last) != columns {
		t.Errorf("the row has %d columns: %s", utf8.RuneCountInString(last), last)
	}
}
