package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"errors"
	"io"
	"regexp"
	"strings"
	"testing"

	"github.com/hsmkey/hsmkey/internal/batchfile"
	"github.com/hsmkey/hsmkey/jws"
)

// refusing signs nothing. A script cannot make an HSM do that.
type refusing struct{ crypto.Signer }

var errRefused = errors.New("refused")

func (refusing) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) { return nil, errRefused }

func TestALineThatIsRefusedIsNamed(t *testing.T) {
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := jws.FromSigner(refusing{key}, jws.Options{})
	if err != nil {
		t.Fatal(err)
	}
	run := func(skip bool) (said string, err error) {
		var stdout, stderr bytes.Buffer
		r := &batchRun{
			app: &app{stdout: &stdout, stderr: &stderr}, flags: &batchFlags{out: "-"}, opts: jws.BatchOptions{Skip: skip, Sessions: 2},
			signer: signer, lines: batchfile.NewLines(strings.NewReader("\n{}\n\n\n{}\n[]\n{}\n"), 100), progress: &progress{},
		}
		err = r.do(context.Background())
		if stdout.Len() > 0 {
			t.Errorf("tokens: %s", stdout.String())
		}
		return stderr.String(), err
	}
	said, err := run(true)
	if err != nil {
		t.Error(err)
	}
	const want = `^skipped: line 2: .*refused
skipped: line 5: .*refused
skipped: line 6: .*JSON array
skipped: line 7: .*refused
signed 0 tokens .*; skipped 4 lines
$`
	if !regexp.MustCompile(want).MatchString(said) {
		t.Errorf("it says\n%swant\n%s", said, want)
	}
	_, err = run(false)
	if !errors.Is(err, errRefused) || !strings.HasPrefix(err.Error(), "line 2: ") {
		t.Errorf("the first line: %v", err)
	}
}
