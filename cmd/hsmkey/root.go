package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// app is one run of the program.
type app struct {
	stdin  *os.File
	stdout io.Writer
	stderr io.Writer
	global globalFlags

	// catchSignals is called by what must not be cut off: because it changes
	// something, or has something to put back. Until then Ctrl-C ends the program
	// at once, which saves signing a token a good deal of its time.
	catchSignals func()
}

// run is the whole program but the process around it. It returns the exit
// status. catchSignals makes signals cancel ctx.
func run(ctx context.Context, args []string, stdin *os.File, stdout, stderr io.Writer, catchSignals func()) int {
	a := &app{stdin: stdin, stdout: stdout, stderr: stderr, catchSignals: catchSignals}
	root := a.rootCommand(args)
	acting := watch(root)
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if err != nil && !*acting {
		// What fails before a command begins is its use: flags and arguments.
		err = &usageError{err}
	}
	return a.report(cmd.CommandPath(), err)
}

// watch makes every command note that it has begun.
func watch(root *cobra.Command) (acting *bool) {
	acting = new(bool)
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		if act := cmd.RunE; act != nil {
			cmd.RunE = func(cmd *cobra.Command, args []string) error {
				*acting = true
				return act(cmd, args)
			}
		}
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(root)
	return acting
}

// builder makes one command of the program.
type builder struct {
	name string
	make func(*app) *cobra.Command
}

var commands = []builder{
	{"init", (*app).initCommand},
	{"key", (*app).keyCommand},
	{"sign", (*app).signCommand},
	{"batch", (*app).batchCommand},
	{"bench", (*app).benchCommand},
	{"verify", (*app).verifyCommand},
	{"jwk", (*app).jwkCommand},
	{"jwks", (*app).jwksCommand},
	{"doctor", (*app).doctorCommand},
	{"completion", (*app).completionCommand},
	{"version", (*app).versionCommand},
}

// rootCommand makes the program for some arguments: where they begin with a command,
// the others are not made, which would take as long as a signature.
func (a *app) rootCommand(args []string) *cobra.Command {
	root := &cobra.Command{
		Use:   "hsmkey",
		Short: "Sign and verify tokens with keys that never leave the HSM",
		Long: `hsmkey signs and verifies JSON Web Tokens with keys that never leave a hardware
security module (HSM). It speaks PKCS#11, so that any HSM, smart card or software
token with a PKCS#11 library will do.

Which HSM, and with which PIN, is said by flags or by the environment; flags win:

  HSM_MODULE             the PKCS#11 library; default: SoftHSM2, if installed
  HSM_TOKEN              label of the token; default: the only one with a PIN
  HSM_PIN, HSM_PIN_FILE  the PIN, or a file that holds it; default: a prompt
  HSM_URI                a PKCS#11 URI that says all of it

In a directory where "hsmkey init" made a token, that token is the default.
Exit status: 0 done; 1 failed; 2 usage or configuration; 3 PIN; 4 key not found
or ambiguous; 5 no session with the HSM; 6 the token does not verify.`,
		Example: `  hsmkey init
  hsmkey key generate demo --type ec:P-256
  hsmkey sign --key demo --claims '{"sub":"alice"}' --expires-in 1h`,
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return checkGiven(cmd.Flags()) },
	}
	a.global.register(root)
	asGroup(root)
	only := slices.IndexFunc(commands, func(b builder) bool { return len(args) > 0 && args[0] == b.name })
	for i, b := range commands {
		if only < 0 || i == only {
			root.AddCommand(b.make(a))
		}
	}
	if only < 0 {
		root.Version = versionName() // for --version
	}
	checkHelp(root)
	return root
}

// checkHelp makes help on a command that is not there the mistake that the command
// itself would be; cobra's prints that and ends with 0.
func checkHelp(root *cobra.Command) {
	root.InitDefaultHelpCmd()
	for _, help := range root.Commands() {
		if help.Name() == "help" {
			help.Args = func(_ *cobra.Command, args []string) error {
				group, unknown, err := root.Find(args)
				if err != nil || len(unknown) == 0 {
					return err
				}
				return unknownCommand(group, unknown[0])
			}
		}
	}
}

// asGroup makes a command one that only holds others: alone, or with a name that
// it does not know, its use is wrong.
func asGroup(group *cobra.Command) {
	group.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return withHint(errors.New("a command is missing"), "`%s --help` lists the commands", cmd.CommandPath())
		}
		return unknownCommand(cmd, args[0])
	}
	group.RunE = func(*cobra.Command, []string) error { return nil }
}

func unknownCommand(group *cobra.Command, name string) error {
	err := fmt.Errorf("unknown command %q", name)
	group.SuggestionsMinimumDistance = 2
	if similar := group.SuggestionsFor(name); len(similar) > 0 {
		return withHint(err, "did you mean `%s %s`?", group.CommandPath(), similar[0])
	}
	return withHint(err, "`%s --help` shows what there is", group.CommandPath())
}

// none marks the flags to which nothing is a value, too.
const none = "none"

func mayBeEmpty(flags *pflag.FlagSet, names ...string) {
	for _, name := range names {
		if err := flags.SetAnnotation(name, none, nil); err != nil {
			panic(err) // a flag that the command does not have: a mistake of ours
		}
	}
}

// checkGiven refuses flags that are given without a value: most often a variable
// of the shell is not set, and what is meant is not the default.
func checkGiven(flags *pflag.FlagSet) (err error) {
	flags.Visit(func(flag *pflag.Flag) {
		empty := flag.Value.String() == ""
		if list, is := flag.Value.(pflag.SliceValue); is {
			empty = len(list.GetSlice()) == 0
		}
		if _, may := flag.Annotations[none]; empty && !may {
			err = withHint(usagef("--%s is empty", flag.Name), "give it a value, or leave it out; is a variable of the shell not set?")
		}
	})
	return err
}
