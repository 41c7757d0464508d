package sessionpool_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// direct is how SoftHSM2 is used unless a test looks at its calls.
func direct(c *sessionpool.Config) { c.Direct = true }

// outcome waits for how something ended, and fails the test if it does not end.
func outcome(t *testing.T, what string, ended <-chan error) error {
	t.Helper()
	select {
	case err := <-ended:
		return err
	case <-time.After(30 * time.Second):
		t.Fatalf("%s does not end", what)
		return nil
	}
}

func TestADirectPoolMayBeClosedByAHookOfItsOwn(t *testing.T) {
	h := newHSM(t)
	closed := make(chan error, 1)
	var p *sessionpool.Pool
	ready := make(chan struct{})
	p = h.pool(t, direct, func(c *sessionpool.Config) {
		c.IdleTimeout = 20 * time.Millisecond
		c.OnEvent = func(e sessionpool.Event) {
			if e.Cause == sessionpool.CloseIdle && len(closed) == 0 {
				<-ready
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
				defer cancel()
				closed <- p.Close(ctx)
			}
		}
	})
	s := acquire(t, p)
	s.Release()
	close(ready)
	if err := outcome(t, "Close, called from the sweep that it waits for", closed); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Close in the sweep: %v, want that its context ended", err)
	}
}

func TestClosingADirectPoolWaitsNoLongerThanItsContextForOthers(t *testing.T) {
	h := newHSM(t)
	closing, leave := make(chan struct{}, 2), make(chan struct{})
	p := h.pool(t, direct, func(c *sessionpool.Config) {
		c.IdleTimeout = 20 * time.Millisecond
		c.OnEvent = func(e sessionpool.Event) {
			if e.Cause == sessionpool.CloseIdle {
				closing <- struct{}{}
				<-leave
			}
		}
	})
	s := acquire(t, p)
	s.Release()
	<-closing
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := p.Close(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Close during a sweep: %v, want context.Canceled", err)
	}
	close(leave)
}

func TestWhoLogsInAgainOnADirectPoolWaitsForThePINNoLongerThanForACall(t *testing.T) {
	h := newHSM(t)
	asked := 0
	p := h.pool(t, direct, func(c *sessionpool.Config) {
		c.OpTimeout = 100 * time.Millisecond
		c.PIN = func(ctx context.Context) (string, error) {
			if asked++; asked == 1 {
				return testhsm.PIN, nil
			}
			<-ctx.Done()
			return "", context.Cause(ctx)
		}
	})
	s := acquire(t, p)
	defer s.Close()
	h.fault.LoseLogin()
	acquired := make(chan error, 1)
	go func() {
		_, err := p.Acquire(context.Background())
		acquired <- err
	}()
	if err := outcome(t, "acquiring without an answer to who asks for the PIN", acquired); !errors.Is(err, sessionpool.ErrTimeout) {
		t.Errorf("acquiring: %v, want ErrTimeout", err)
	}
}

func TestALibraryThatLacksAFunctionDoesNotLoad(t *testing.T) {
	dir := t.TempDir()
	source, library := filepath.Join(dir, "half.c"), filepath.Join(dir, "half.so")
	if err := os.WriteFile(source, []byte("unsigned long upgraded(void); unsigned long C_GetFunctionList(void **p) { return upgraded(); }\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("gcc", "-shared", "-fPIC", "-o", library, source).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v: %s", err, out)
	}
	_, err := sessionpool.New(sessionpool.Config{Module: library})
	if !errors.Is(err, sessionpool.ErrConfig) || !strings.Contains(err.Error(), "upgraded") {
		t.Errorf("%v, want ErrConfig that names the function", err)
	}
}
