package main

import (
	"context"
	"encoding/base64"
	"runtime"
	"strings"
	"sync"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/batchfile"
	"github.com/hsmkey/hsmkey/jws"
)

// signatureCheck verifies tokens, on all processors: that takes longer than all else
// that there is to do about tokens of earlier runs.
type signatureCheck struct {
	verify func(token string) bool
	places chan struct{}
	group  sync.WaitGroup

	mu    sync.Mutex
	first int // the number of the first token that does not verify
}

// newSignatureCheck returns a check of tokens of a key. To verify a MAC is as much
// work for the HSM as to sign anew: its length has to do.
func newSignatureCheck(key *hsmkey.HSMJWK, alg hsmkey.Algorithm) (*signatureCheck, error) {
	c := &signatureCheck{places: make(chan struct{}, runtime.GOMAXPROCS(0))}
	if key.Public() == nil {
		c.verify = func(token string) bool {
			mac, err := base64.RawURLEncoding.DecodeString(token[strings.LastIndexByte(token, '.')+1:])
			return err == nil && len(mac) == macSizes[alg]
		}
		return c, nil
	}
	verifier, err := jws.NewKeyVerifier(key, jws.VerifierOptions{Algorithms: []hsmkey.Algorithm{alg}, MaxSize: batchfile.MaxToken})
	if err != nil {
		return nil, err
	}
	c.verify = func(token string) bool {
		_, err := verifier.Verify(context.Background(), token) // it takes no time to speak of
		return err == nil
	}
	return c, nil
}

var macSizes = map[hsmkey.Algorithm]int{hsmkey.HS256: 32, hsmkey.HS384: 48, hsmkey.HS512: 64}

// add verifies a token, when there is a place for it.
func (c *signatureCheck) add(token batchfile.Line) {
	text := string(token.Text)
	c.places <- struct{}{}
	c.group.Go(func() {
		defer func() { <-c.places }()
		if !c.verify(text) {
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.first == 0 || token.Number < c.first {
				c.first = token.Number
			}
		}
	})
}

// hasFailed reports whether some token is known not to verify.
func (c *signatureCheck) hasFailed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.first > 0
}

// failed waits for the tokens that were added and returns the number of the first
// one that does not verify, or 0.
func (c *signatureCheck) failed() int {
	c.group.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.first
}
