package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/testhsm"
)

// names of the peers, in the order of the table. The first one is what the others
// are measured against.
const (
	bareC        = "C loop"
	bareGo       = "miekg/pkcs11 loop"
	overCrypto11 = "go-jose, crypto11"
	overPkcs11k  = "go-jose, pkcs11key"
	single       = "hsmkey, Sign"
	batch        = "hsmkey, Batch"
)

var peerNames = []string{bareC, bareGo, overCrypto11, overPkcs11k, single, batch}

// process is a peer at work.
type process struct {
	name    string
	command *exec.Cmd
	stdin   io.WriteCloser
	stdout  *bufio.Scanner
}

func startPeers(ctx context.Context, token *testhsm.HSM, bareLoop string) ([]*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	var peers []*process
	for _, name := range peerNames {
		p := &process{name: name, command: exec.CommandContext(ctx, self, "-serve", name)}
		if name == bareC {
			p.command = exec.CommandContext(ctx, bareLoop, token.Module, token.Labels[0])
		}
		p.command.Env = append(os.Environ(), token.Env()...)
		p.command.Stderr = os.Stderr
		if err := p.start(); err != nil {
			return peers, fmt.Errorf("%s: %w", name, err)
		}
		peers = append(peers, p)
	}
	return peers, nil
}

// start returns when the peer is ready: SoftHSM2 does not bear several processes
// that log in at once.
func (p *process) start() (err error) {
	if p.stdin, err = p.command.StdinPipe(); err != nil {
		return err
	}
	stdout, err := p.command.StdoutPipe()
	if err != nil {
		return err
	}
	p.stdout = bufio.NewScanner(stdout)
	if err := p.command.Start(); err != nil {
		return err
	}
	if !p.stdout.Scan() || p.stdout.Text() != "ready" {
		p.stop()
		return fmt.Errorf("it does not start: %q", p.stdout.Text())
	}
	return nil
}

// stop ends the process: with its input its work ends, too.
func (p *process) stop() {
	_ = p.stdin.Close()
	_ = p.command.Wait()
}

// errCannot is what a peer says that does not know an algorithm.
var errCannot = errors.New("cannot")

// slice is what a peer did in one of its turns.
type slice struct {
	rate float64       // signatures per second
	cpu  time.Duration // processor time of one
}

// measure has the peer sign for a while.
func (p *process) measure(alg hsmkey.Algorithm, sessions int, d time.Duration) (slice, error) {
	// What is signed is the header, a dot and the claims, in base64url.
	const bytes = 300
	if _, err := fmt.Fprintln(p.stdin, alg, keyLabel(alg), sessions, d.Milliseconds(), bytes); err != nil {
		return slice{}, fmt.Errorf("%s: %w", p.name, err)
	}
	if !p.stdout.Scan() {
		return slice{}, fmt.Errorf("%s ended: %w", p.name, errors.Join(p.stdout.Err(), io.ErrUnexpectedEOF))
	}
	answer := p.stdout.Text()
	if reason, found := strings.CutPrefix(answer, "cannot: "); found {
		return slice{}, fmt.Errorf("%w: %s", errCannot, reason)
	}
	var count, wall, cpu int64
	if _, err := fmt.Sscan(answer, &count, &wall, &cpu); err != nil || count < 0 || wall <= 0 {
		return slice{}, fmt.Errorf("%s, %s in %d sessions: %s", p.name, alg, sessions, answer)
	}
	return slice{float64(count) / time.Duration(wall).Seconds(), time.Duration(cpu / max(count, 1))}, nil
}
