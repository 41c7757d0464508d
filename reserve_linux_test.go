package hsmkey_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/fault"
	"github.com/hsmkey/hsmkey/internal/testhsm"
)

// A private instance of SoftHSM2 is like another process: it does not notice what
// others write to a token once it has written itself.
func TestOneKeyIsMadeAtATimeOnATokenWhoeverMakesIt(t *testing.T) {
	injector, others := fault.New(), fault.New()
	c := config(testhsm.New(t))
	c.Pool.Wrap = injector.Wrap
	h := open(t, c)
	c.Pool.Private, c.Pool.Wrap = true, others.Wrap
	other := open(t, c)
	objects(t, h) // they are ready
	objects(t, other)
	reached, release := others.Hang("C_GenerateKeyPair")
	defer release()
	made := make(chan error)
	go func() {
		_, err := other.Generate(context.Background(), "key", hsmkey.RSA2048, nil)
		made <- err
	}()
	<-reached
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if _, err := h.Generate(ctx, "key", hsmkey.RSA2048, nil); !errors.Is(err, hsmkey.ErrTimeout) {
		t.Errorf("Generate = %v, want ErrTimeout: the other one is at it", err)
	}
	if n := injector.Calls("C_GenerateKeyPair"); n != 0 {
		t.Errorf("C_GenerateKeyPair was called %d times, want never", n)
	}
	release()
	if err := <-made; err != nil {
		t.Error(err)
	}
	if _, err := h.Generate(context.Background(), "key", hsmkey.RSA2048, nil); !errors.Is(err, hsmkey.ErrExists) {
		t.Errorf("Generate = %v, want ErrExists", err)
	}
	mustFind(t, h, hsmkey.Query{Label: "key"})
}
