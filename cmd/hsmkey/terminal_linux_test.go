package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
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

func TestTokensOnATerminalAreNotMixedWithABar(t *testing.T) {
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

func TestTheBarOfAResumedBatchIsAboutWhatIsLeft(t *testing.T) {
	_, term := batchOnTerminal(t, "head -n 1 claims.jsonl | hsmkey batch --key key --out tokens", "--out", "tokens", "--resume")
	term.waitFor("checking (1/")
	term.waitFor("signing ")
	term.waitFor("(1/2, ")
	term.waitFor("signed 2 tokens")
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
