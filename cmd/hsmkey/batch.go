package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/batchfile"
	"github.com/hsmkey/hsmkey/jws"
)

// batchFlags say what a batch is.
type batchFlags struct {
	key              keyFlags
	alg, in, out     string
	sessions         string
	onError          string
	resume, uniqueID bool
	expiresIn        time.Duration
	expiresGiven     bool
	inputGiven       bool
}

func (a *app) batchCommand() *cobra.Command {
	var f batchFlags
	cmd := &cobra.Command{
		Use:   "batch --key LABEL [--in FILE] [--out FILE]",
		Short: "Sign many claims, one JSON object a line",
		Long: `Signs each line of the input, a JSON object with claims, and writes one token a
line, in the order of the input. Progress goes to standard error when that is a
terminal.

The output gets its name when it is complete; until then it is NAME.partial, and a
run that was interrupted or killed goes on from there with --resume. To standard
output (--out -) tokens are written as they come.`,
		Example: `  hsmkey key generate issuer --type ec:P-256
  printf '{"sub":"%s"}\n' alice bob carol > claims.jsonl
  hsmkey batch --key issuer --in claims.jsonl --out tokens.txt --expires-in 1h
  hsmkey batch --key issuer < claims.jsonl`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			f.expiresGiven = cmd.Flags().Changed("expires-in")
			f.inputGiven = cmd.Flags().Changed("in")
			return a.batch(cmd.Context(), &f)
		},
	}
	f.key.register(cmd)
	flags := cmd.Flags()
	flags.StringVar(&f.alg, "alg", "", "algorithm (default: the key's)")
	flags.StringVar(&f.in, "in", "-", "input: FILE, or - for standard input")
	flags.StringVar(&f.out, "out", "-", "output: FILE, or - for standard output")
	flags.StringVar(&f.sessions, "sessions", "auto", "sessions to sign in: a number, or auto for as many as pay off")
	flags.StringVar(&f.onError, "on-error", "stop", "what to do about a line that cannot be signed: stop or skip")
	flags.BoolVar(&f.resume, "resume", false, "go on from where an earlier run into the same --out ended")
	flags.DurationVar(&f.expiresIn, "expires-in", 0, "add the claims iat, now, and exp, this much later, such as 1h")
	flags.BoolVar(&f.uniqueID, "jti", false, "add the claim jti, a random id")
	fixedCompletions(cmd, "alg", algorithms)
	fixedCompletions(cmd, "on-error", []string{"stop", "skip"})
	return cmd
}

// check finds what is wrong with the flags before anything is touched.
func (f *batchFlags) check() (opts jws.BatchOptions, err error) {
	switch f.onError {
	case "stop", "skip":
		opts.Skip = f.onError == "skip"
	default:
		return opts, usagef("--on-error is %q, want stop or skip", f.onError)
	}
	if f.sessions != "auto" {
		n, err := strconv.Atoi(f.sessions)
		if err != nil || n < 1 || n > jws.MaxBatchSessions {
			return opts, usagef("--sessions is %q, want auto or a number from 1 to %d", f.sessions, jws.MaxBatchSessions)
		}
		opts.Sessions = n
	}
	if f.expiresGiven && f.expiresIn < time.Second {
		return opts, withHint(usagef("--expires-in is %v, want a second or more", f.expiresIn), "a time looks like 90s, 15m or 1h30m")
	}
	if f.resume && f.out == "-" {
		return opts, usagef("--resume needs --out: what went to standard output cannot be looked at")
	}
	if f.out != "-" && f.in != "-" && sameFile(f.in, f.out) {
		return opts, usagef("--in and --out are the same file")
	}
	return opts, nil
}

func sameFile(a, b string) bool {
	x, errX := os.Stat(a)
	y, errY := os.Stat(b)
	return errX == nil && errY == nil && os.SameFile(x, y)
}

func (a *app) batch(ctx context.Context, f *batchFlags) error {
	opts, err := f.check()
	if err != nil {
		return err
	}
	query, err := f.key.query()
	if err != nil {
		return err
	}
	options := jws.Options{Type: "JWT"}
	if f.alg != "" {
		list, err := parseAlgorithms([]string{f.alg})
		if err != nil {
			return err
		}
		options.Algorithm = list[0]
	}
	if !f.inputGiven && a.stdinIsTerminal() {
		return withHint(usagef("no input: --in is missing, and standard input is a terminal"), "give a file with one JSON object a line")
	}
	input, err := a.openInput(f.in)
	if err != nil {
		return err
	}
	defer func() { _ = input.Close() }()
	return a.withHSM(ctx, func(h *hsmkey.HSM) error {
		key, err := h.Key(ctx, query)
		if err != nil {
			return err
		}
		signer, err := jws.NewSigner(key, options)
		if err != nil {
			return withHint(err, "`hsmkey key list` shows which algorithms each key signs with")
		}
		run := &batchRun{app: a, flags: f, opts: opts, signer: signer, input: input}
		return run.do(ctx)
	})
}

// openInput opens a file, or takes standard input.
func (a *app) openInput(name string) (*os.File, error) {
	if name == "-" {
		return a.stdin, nil
	}
	file, err := os.Open(name)
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
	return file, nil
}

// batchRun is one run of the command.
type batchRun struct {
	app    *app
	flags  *batchFlags
	opts   jws.BatchOptions
	signer *jws.Signer
	input  *os.File

	claims   claimsMaker
	out      *batchfile.Output // nil: standard output
	progress *progress
	signed   int
	skipped  int
	sessions int
}

func (r *batchRun) do(ctx context.Context) error {
	r.claims = claimsMaker{expiresIn: r.flags.expiresIn, uniqueID: r.flags.uniqueID}
	r.progress = r.app.newProgress(r.input)
	started := time.Now()
	if r.flags.out != "-" {
		if err := r.openOutput(); err != nil {
			return err
		}
	}
	err := r.sign(ctx)
	r.progress.finish()
	err = errors.Join(err, r.closeOutput(err))
	if err == nil || r.signed > 0 {
		r.summary(time.Since(started))
	}
	return err
}

func (r *batchRun) openOutput() (err error) {
	if !r.flags.resume {
		r.out, err = batchfile.Create(r.flags.out)
		if errors.Is(err, batchfile.ErrUnfinished) {
			return withHint(err, "go on with --resume, or remove that file")
		}
	} else {
		r.out, err = batchfile.Resume(r.flags.out)
	}
	if err != nil {
		return withHint(fmt.Errorf("--out: %w", err), "does the directory exist, and may you write there?")
	}
	return nil
}

// closeOutput gives the output its name, or keeps what there is of it.
func (r *batchRun) closeOutput(failed error) error {
	if r.out == nil {
		return nil
	}
	if failed == nil {
		return r.out.Finish()
	}
	kept, err := r.out.Abandon()
	if kept {
		r.app.note("%s has %s; --resume goes on from there", filepath.Base(r.flags.out)+batchfile.Suffix, counted(r.out.Written+r.signed, "token"))
	}
	return err
}

// sign runs the batch, and writes its tokens.
func (r *batchRun) sign(ctx context.Context) (err error) {
	lines := &lineFeed{claims: &r.claims, skip: r.opts.Skip, signer: r.signer}
	if r.out != nil {
		lines.done, lines.last = r.out.Written, r.out.Last
	}
	r.opts.Prepare = lines.prepare
	r.opts.OnSessions = func(n int) { r.sessions = n }
	write := r.writer()
	defer func() { err = errors.Join(err, write("")) }()
	for token, err := range r.signer.Batch(ctx, lines.all(r.input), r.opts) {
		if item := (*jws.ItemError)(nil); errors.As(err, &item) {
			if !r.opts.Skip {
				return item.Err
			}
			r.skipped++
			r.progress.clear()
			r.app.note("skipped: %v", item.Err)
			continue
		}
		if err == nil {
			err = write(token)
		}
		if err != nil {
			return err
		}
		r.signed++
		r.progress.set(r.signed + r.skipped)
	}
	return lines.err
}

// writer returns what writes a token, and, with nothing, what is still held.
func (r *batchRun) writer() func(string) error {
	if r.out != nil {
		return func(token string) error {
			if token == "" {
				return nil
			}
			return r.out.Write(token)
		}
	}
	w := newEagerWriter(r.app.stdout)
	return func(token string) error {
		if token == "" {
			return w.close()
		}
		return w.line(token)
	}
}

// summary tells what was done.
func (r *batchRun) summary(took time.Duration) {
	text := fmt.Sprintf("signed %s in %v (%.0f/s)", counted(r.signed, "token"), took.Round(time.Millisecond), float64(r.signed)/max(took.Seconds(), 0.001))
	if r.sessions > 0 {
		text += " in " + counted(r.sessions, "session")
	}
	if r.out != nil && r.out.Written > 0 {
		text += fmt.Sprintf(", after %d of earlier runs", r.out.Written)
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
