package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/balance"
	"github.com/hsmkey/hsmkey/internal/softhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// globalFlags say which HSM to use and how. All settings go one way: a flag
// takes the place of its variable in the environment, and the library reads that.
type globalFlags struct {
	module      string
	token       string
	pinFile     string
	uri         string
	balanceList string
	timeout     time.Duration
	verbose     bool
	flags       *pflag.FlagSet
}

func (g *globalFlags) register(root *cobra.Command) {
	flags := root.PersistentFlags()
	g.flags = flags
	flags.StringVar(&g.module, "module", "", "PKCS#11 library (HSM_MODULE)")
	flags.StringVar(&g.token, "token", "", "label of the token (HSM_TOKEN)")
	flags.StringVar(&g.pinFile, "pin-file", "", "file that holds the PIN (HSM_PIN_FILE)")
	flags.StringVar(&g.uri, "uri", "", "PKCS#11 URI of the token, RFC 7512 (HSM_URI)")
	flags.StringVar(&g.balanceList, "balance-list", "", "list files of HSMs to balance over (HSM_LOAD_BALANCE_LIST)")
	flags.DurationVar(&g.timeout, "timeout", 0, "limit of each PKCS#11 call, such as 30s (HSM_OP_TIMEOUT; default 10s)")
	flags.BoolVarP(&g.verbose, "verbose", "v", false, "log sessions and logins to standard error (HSM_VERBOSE=1)")
}

// The environment variables that this file writes to or looks at.
const (
	envModule      = "HSM_MODULE"
	envToken       = "HSM_TOKEN"
	envPIN         = "HSM_PIN"
	envPINFile     = "HSM_PIN_FILE"
	envURI         = "HSM_URI"
	envBalanceList = "HSM_LOAD_BALANCE_LIST"
	envTimeout     = "HSM_OP_TIMEOUT"
	envVerbose     = "HSM_VERBOSE"
	envSoftHSM     = "SOFTHSM2_CONF"
)

// developmentDir is where `hsmkey init` makes its token unless told otherwise.
const developmentDir = ".hsm"

// How long to wait at the end for a call that still runs in the module.
const (
	closeSoon    = 2 * time.Second
	closePatient = 10 * time.Second // it may have a key to remove that nobody waits for
)

// generationTimeout takes the place of the default limit of PKCS#11 calls where
// a key is generated: RSA keys take their time.
const generationTimeout = 2 * time.Minute

// withHSM runs fn, which changes nothing, with the HSM that flags and environment
// name.
func (a *app) withHSM(ctx context.Context, fn func(*hsmkey.HSM) error) error {
	config, err := a.config()
	if err != nil {
		return err
	}
	if config.Balance.Lists == "" && isSoftHSM(config.Pool.Module) {
		h, err := open(ctx, config)
		if err != nil {
			return err
		}
		return fn(h) // nothing of it outlives the process, whose end is at hand
	}
	return a.with(ctx, config, closeSoon, fn)
}

// changeHSM is withHSM for changes of the token.
func (a *app) changeHSM(ctx context.Context, fn func(*hsmkey.HSM) error) error {
	config, err := a.config()
	if err != nil {
		return err
	}
	if config.Pool.OpTimeout == 0 && config.Balance.Lists == "" { // over lists nothing is generated
		config.Pool.OpTimeout = generationTimeout
	}
	return a.with(ctx, config, closePatient, fn)
}

// with runs fn with an HSM, and ends in order when it is interrupted: a card may stay
// logged in, the way to an HSM of a list have a socket on the disk, and fn have
// changed something.
func (a *app) with(ctx context.Context, config hsmkey.Config, patience time.Duration, fn func(*hsmkey.HSM) error) error {
	a.catchSignals()
	h, err := open(ctx, config)
	if err != nil {
		return err
	}
	result := fn(h)

	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	late := time.AfterFunc(time.Second, func() {
		a.note("waiting for a call in the PKCS#11 library to end; Ctrl-C leaves at once")
	})
	defer late.Stop()
	if err := h.Close(end); err != nil && result == nil {
		a.note("warning: closing the HSM: %v", err)
	}
	return result
}

// open opens an HSM.
func open(ctx context.Context, config hsmkey.Config) (*hsmkey.HSM, error) {
	h, err := hsmkey.Open(ctx, config)
	switch {
	case errors.Is(err, hsmkey.ErrConfig) && config.Balance.Lists != "":
		err = withHint(err, "a list has one endpoint a line, `ADDRESS PORT` or a PKCS#11 URI; see docs/load-balancing.md")
	case errors.Is(err, hsmkey.ErrConfig):
		err = withHint(err, "name the HSM with --module and --token, or make a token for development with `hsmkey init`")
	case errors.Is(err, hsmkey.ErrSession):
		err = withHint(err, "is the HSM up, and its library configured (SoftHSM2: SOFTHSM2_CONF, NSS: HSM_MODULE_ARGS)? `hsmkey doctor` shows more")
	}
	return h, err
}

// config reads flags and environment.
func (a *app) config() (hsmkey.Config, error) {
	g := &a.global
	uri, err := g.readURI()
	if err != nil {
		return hsmkey.Config{}, err
	}
	if g.token != "" {
		uri.Serial, uri.SlotID = "", nil // of HSM_URI: the flag wins
	}
	if err := uri.toEnvironment(); err != nil {
		return hsmkey.Config{}, err
	}
	if err := g.toEnvironment(); err != nil {
		return hsmkey.Config{}, err
	}
	if err := defaultToDevelopment(uri); err != nil {
		return hsmkey.Config{}, err
	}
	config, err := hsmkey.FromEnv()
	if err != nil {
		return hsmkey.Config{}, err
	}
	uri.toPool(&config.Pool)
	if config.Pool.PIN == nil {
		config.Pool.PIN = a.promptPIN(config.Pool.TokenLabel)
	}
	switch verbose := os.Getenv(envVerbose); verbose {
	case "1":
		options := &slog.HandlerOptions{Level: slog.LevelDebug}
		logger := slog.New(slog.NewTextHandler(lineWriter{a.stderr}, options))
		config.Pool.OnEvent, config.Balance.OnEvent = sessionpool.LogEvents(logger), balance.LogEvents(logger)
	case "", "0":
	default:
		return hsmkey.Config{}, fmt.Errorf("%w: %s is %q, want 0 or 1", hsmkey.ErrConfig, envVerbose, verbose)
	}
	return config, nil
}

// toEnvironment lets the flags take the place of their variables.
func (g *globalFlags) toEnvironment() error {
	set := map[string]string{}
	if g.module != "" {
		set[envModule] = g.module
	}
	if g.token != "" {
		set[envToken] = g.token
	}
	if g.pinFile != "" {
		set[envPINFile] = g.pinFile
		set[envPIN] = ""
	}
	if g.balanceList != "" {
		set[envBalanceList] = g.balanceList
	}
	if g.flags.Changed("timeout") {
		if g.timeout <= 0 {
			return usagef("--timeout is %v, want more than nothing", g.timeout)
		}
		set[envTimeout] = g.timeout.String()
	}
	if g.flags.Changed("verbose") {
		set[envVerbose] = map[bool]string{true: "1", false: "0"}[g.verbose]
	}
	return setEnvironment(set)
}

// setEnvironment sets variables; one that is to be empty is unset.
func setEnvironment(set map[string]string) error {
	for name, value := range set {
		var err error
		if value == "" {
			err = os.Unsetenv(name)
		} else {
			err = os.Setenv(name, value)
		}
		if err != nil {
			return fmt.Errorf("%w: %s: %w", hsmkey.ErrConfig, name, err)
		}
	}
	return nil
}

// defaultToDevelopment makes the token of `hsmkey init` in the working directory
// the one to use, as far as nothing else was chosen. Its PIN goes to no other.
func defaultToDevelopment(uri tokenURI) error {
	softHSM := isSoftHSM(os.Getenv(envModule)) && os.Getenv(envBalanceList) == ""
	if conf := os.Getenv(envSoftHSM); conf != "" {
		// All that the library says of it is CKR_GENERAL_ERROR.
		if _, err := os.Stat(conf); err != nil && softHSM { //nolint:gosec // the user names the file
			return withHint(fmt.Errorf("%w: %s: %w", hsmkey.ErrConfig, envSoftHSM, err), "it names SoftHSM2's configuration; `hsmkey init` makes one, with a token for development")
		}
		return nil
	}
	elsewhere := !softHSM || uri.Serial != "" || uri.SlotID != nil
	token, err := softhsm.Find(developmentDir)
	if errors.Is(err, softhsm.ErrNone) || err != nil && elsewhere {
		return nil
	}
	if err != nil {
		return withHint(err, "`hsmkey init` repairs it")
	}
	set := map[string]string{envSoftHSM: token.Conf()}
	if label := os.Getenv(envToken); !elsewhere && (label == "" || label == token.Label) {
		set[envToken] = token.Label
		if _, pin := os.LookupEnv(envPIN); !pin && os.Getenv(envPINFile) == "" {
			set[envPINFile] = token.PINFile()
		}
	}
	return setEnvironment(set)
}

// isSoftHSM reports whether a library is SoftHSM2 by its name, or the default.
func isSoftHSM(module string) bool {
	return module == "" || strings.HasPrefix(filepath.Base(module), "libsofthsm2.")
}
