package jws_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jws"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// shortMessages is a module that hashes, and takes no more than so many bytes.
type shortMessages struct {
	sessionpool.Module
	most int
}

func (m shortMessages) SignSingle(dst []byte, h pkcs11.SessionHandle, mechanism *pkcs11.Mechanism, key pkcs11.ObjectHandle, data []byte, size int) ([]byte, error) {
	if len(data) > m.most {
		return nil, pkcs11.Error(pkcs11.CKR_DATA_LEN_RANGE)
	}
	return m.Module.SignSingle(dst, h, mechanism, key, data, size)
}

func (m shortMessages) SignLots(ctx context.Context, h pkcs11.SessionHandle, mechanism *pkcs11.Mechanism, key pkcs11.ObjectHandle, size int, next func() *sessionpool.Lot, done func(*sessionpool.Lot)) error {
	return sessionpool.SignEach(ctx, m, h, mechanism, key, size, next, done)
}

// The first one is among them: nothing has shown yet that the key signs at all.
func TestAnItemThatTheHSMRefusesIsItsOwnAffair(t *testing.T) {
	for name, direct := range map[string]bool{"directly": true, "on the session's goroutine": false} {
		t.Run(name, func(t *testing.T) {
			hsm, _ := faultyHSM(t, func(c *sessionpool.Config) {
				c.Direct = direct
				c.Wrap = func(m sessionpool.Module) sessionpool.Module { return shortMessages{m, 2000} }
			})
			signer := newSigner(t, generate(t, hsm, hsmkey.Ed25519), jws.Options{})
			long := func(i int, item []byte) ([]byte, error) {
				if i%50 == 0 {
					return make([]byte, 3000), nil
				}
				return item, nil
			}
			at := 0
			for token, err := range signer.Batch(context.Background(), numbered(200), jws.BatchOptions{Sessions: 2, Skip: true, Prepare: long}) {
				var item *jws.ItemError
				switch {
				case at%50 == 0 && (!errors.As(err, &item) || item.Index != at || !errors.Is(err, hsmkey.ErrInvalid) || token != ""):
					t.Errorf("item %d: token %q and error %v, want ErrInvalid", at, token, err)
				case at%50 != 0 && err != nil:
					t.Errorf("item %d: %v", at, err)
				}
				at++
			}
			if at != 200 {
				t.Errorf("%d elements, want 200", at)
			}
		})
	}
}

// ahead takes two lots before it signs the first, as SoftHSM2 does on its thread,
// and now and then fails.
type ahead struct {
	sessionpool.Module
	calls *atomic.Int32
}

func (m ahead) SignLots(ctx context.Context, h pkcs11.SessionHandle, mechanism *pkcs11.Mechanism, key pkcs11.ObjectHandle, size int, next func() *sessionpool.Lot, done func(*sessionpool.Lot)) error {
	var taken []*sessionpool.Lot
	for {
		for len(taken) < 2 {
			lot := next()
			if lot == nil {
				break
			}
			taken = append(taken, lot)
		}
		if len(taken) == 0 {
			return nil
		}
		codes := []pkcs11.Error{pkcs11.CKR_USER_NOT_LOGGED_IN, pkcs11.CKR_KEY_HANDLE_INVALID, pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_DATA_LEN_RANGE}
		if n := int(m.calls.Add(1)); n%3 == 0 {
			return codes[n/3%len(codes)]
		}
		lot := taken[0]
		taken = taken[1:]
		one := func() *sessionpool.Lot { l := lot; lot = nil; return l }
		if err := sessionpool.SignEach(ctx, m, h, mechanism, key, size, one, done); err != nil {
			return err
		}
	}
}

func TestNoItemIsLostWithTheLotsThatAnHSMHasWhenItFails(t *testing.T) {
	for _, sessions := range []int{0, 1, 3} {
		t.Run(fmt.Sprintf("%d sessions", sessions), func(t *testing.T) {
			calls := new(atomic.Int32)
			hsm, _ := faultyHSM(t, func(c *sessionpool.Config) {
				c.Direct = true
				c.Wrap = func(m sessionpool.Module) sessionpool.Module { return ahead{m, calls} }
			})
			key := generate(t, hsm, hsmkey.Ed25519)
			signer := newSigner(t, key, jws.Options{})
			var tokens []string
			for token, err := range signer.Batch(context.Background(), numbered(3000), jws.BatchOptions{Sessions: sessions}) {
				if err != nil {
					t.Fatalf("item %d: %v", len(tokens), err)
				}
				tokens = append(tokens, token)
			}
			if len(tokens) != 3000 || calls.Load() < 9 {
				t.Errorf("%d tokens after %d lots, want 3000 and some that failed", len(tokens), calls.Load())
			}
			checkBatch(t, key, hsmkey.EdDSA, tokens)
		})
	}
}

// The batch has the only session there is, and more input than there is time.
func TestOthersGetASessionWhileABatchGoesOn(t *testing.T) {
	for name, change := range map[string]func(*sessionpool.Config){
		"SoftHSM2 as it is":  func(c *sessionpool.Config) { c.Wrap, c.MaxSessions = nil, 1 },
		"behind a decorator": func(c *sessionpool.Config) { c.MaxSessions = 1 },
	} {
		t.Run(name, func(t *testing.T) {
			hsm, _ := faultyHSM(t, change)
			signer := newSigner(t, generate(t, hsm, hsmkey.P256), jws.Options{})
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			signed := make(chan error)
			tokens := 0
			for _, err := range signer.Batch(ctx, copies(-1), jws.BatchOptions{Sessions: 1}) {
				if err != nil {
					t.Fatal(err)
				}
				if tokens++; tokens == 1000 {
					go func() {
						_, err := signer.Sign(ctx, []byte(`{"sub":"other"}`))
						signed <- err
					}()
				}
				select {
				case err := <-signed:
					if err != nil {
						t.Errorf("beside the batch: %v", err)
					}
					return
				default:
				}
			}
		})
	}
}
