package main

import (
	"context"
	"os"
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
	input, err := a.openInput(ctx, f.in)
	if err != nil {
		return err
	}
	defer func() { _ = input.Close() }()
	config, err := a.config()
	if err != nil {
		return err
	}
	if config.Pool.MaxSessions == 0 {
		config.Pool.MaxSessions = jws.MaxBatchSessions // the batch knows how many it wants
	}
	return a.with(ctx, config, closeSoon, func(h *hsmkey.HSM) error {
		key, err := h.Key(ctx, query)
		if err != nil {
			return err
		}
		signer, err := jws.NewSigner(key, options)
		if err != nil {
			return withHint(err, "`hsmkey key list` shows which algorithms each key signs with")
		}
		run := &batchRun{
			app: a, flags: f, opts: opts, key: key, signer: signer,
			claims: claimsMaker{expiresIn: f.expiresIn, uniqueID: f.uniqueID},
			lines:  batchfile.NewLines(input, batchfile.MaxLine), progress: a.newProgress(input, f.out),
		}
		return run.do(ctx)
	})
}
