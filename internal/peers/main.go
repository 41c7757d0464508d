// Command peers measures ways to sign tokens side by side, on one token in one
// run, and prints what each achieves in relation to a bare loop in C. See
// docs/performance.md.
//
// Each way runs in a process of its own, because two libraries in one process
// would fight over the PKCS#11 module. The processes take turns in short slices,
// so that whatever else the machine does hits all of them, and a ratio is always
// one of two slices that lie close together.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// algorithms are measured in this order, each with a key of its own.
var algorithms = []struct {
	name hsmkey.Algorithm
	key  hsmkey.KeyType
}{
	{hsmkey.RS256, hsmkey.RSA2048},
	{hsmkey.PS256, hsmkey.RSA2048},
	{hsmkey.ES256, hsmkey.P256},
	{hsmkey.EdDSA, hsmkey.Ed25519},
}

// claims are what is signed.
var claims = []byte(`{"iss":"https://issuer.example","sub":"248289761001","aud":"client","iat":1700000000,"exp":1700003600,"jti":"01HF7"}`)

type options struct {
	rounds   int
	slice    time.Duration
	sessions []int
	only     []string
	bareLoop string
}

func main() {
	var o options
	serve := flag.String("serve", "", "be a peer: answer commands on standard input")
	sessions := flag.String("sessions", "1,2,8", "numbers of sessions")
	only := flag.String("algorithms", "", "measure these only, such as ES256,EdDSA")
	flag.IntVar(&o.rounds, "rounds", 5, "slices of each peer")
	flag.DurationVar(&o.slice, "slice", 2*time.Second, "how long each lasts")
	flag.StringVar(&o.bareLoop, "bareloop", "", "the program made of internal/bareloop/bareloop.c")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	var err error
	if *serve != "" {
		err = serveCommands(*serve)
	} else if err = o.parse(*sessions, *only); err == nil {
		err = run(ctx, o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "peers:", err)
		os.Exit(1)
	}
}

func (o *options) parse(sessions, only string) error {
	for _, field := range strings.Split(sessions, ",") {
		n, err := strconv.Atoi(field)
		if err != nil || n < 1 || n > 64 {
			return fmt.Errorf("-sessions %q: want numbers from 1 to 64", sessions)
		}
		o.sessions = append(o.sessions, n)
	}
	if only != "" {
		o.only = strings.Split(only, ",")
	}
	if o.bareLoop == "" || o.rounds < 1 || o.slice <= 0 {
		return fmt.Errorf("-bareloop is missing, or -rounds or -slice is nothing")
	}
	return nil
}

// run makes a token with the keys, starts the peers, and compares them.
func run(ctx context.Context, o options) error {
	dir, err := os.MkdirTemp("", "peers-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // temporary
	token, err := testhsm.Create(dir)
	if err != nil {
		return err
	}
	if err := os.Setenv("SOFTHSM2_CONF", token.Conf); err != nil {
		return err
	}
	if err := makeKeys(ctx, token); err != nil {
		return err
	}
	peers, err := startPeers(ctx, token, o.bareLoop)
	defer func() {
		for _, p := range peers {
			p.stop()
		}
	}()
	if err != nil {
		return err
	}
	return compareAll(ctx, o, peers)
}

// keyLabel is the label of an algorithm's key.
func keyLabel(alg hsmkey.Algorithm) string { return "key-" + string(alg) }

func makeKeys(ctx context.Context, token *testhsm.HSM) error {
	hsm, err := hsmkey.Open(ctx, hsmkey.Config{Pool: poolConfig(token.Module, token.Labels[0])})
	if err != nil {
		return err
	}
	defer hsm.Close(ctx) //nolint:errcheck // the process does nothing else with it
	for _, alg := range algorithms {
		if _, err := hsm.Generate(ctx, keyLabel(alg.name), alg.key, nil); err != nil {
			return err
		}
	}
	return nil
}

func poolConfig(module, token string) sessionpool.Config {
	return sessionpool.Config{Module: module, TokenLabel: token, PIN: sessionpool.StaticPIN(testhsm.PIN), MaxSessions: 64}
}
