package sessionpool

import (
	"os"
	"strings"
	"sync"
	"time"
)

// environment is the process's, which modules read while they are loaded and
// initialised. Whoever needs it changed takes a lease. A module that hangs in
// C_Initialize would keep it for ever, so a lease is taken away after a while:
// by then the module has read what it wanted.
var environment struct {
	mu    sync.Mutex
	lease *lease
}

type lease struct {
	ended   chan struct{}
	restore func()
}

// leaseTime is how long a module may keep others from the environment.
const leaseTime = 5 * time.Second

// withEnv sets NAME=value pairs until the function it returns is called.
func withEnv(pairs []string) (restore func(), err error) {
	if len(pairs) == 0 {
		return func() {}, nil
	}
	for {
		environment.mu.Lock()
		current := environment.lease
		if current == nil {
			mine := &lease{ended: make(chan struct{})}
			if mine.restore, err = setEnv(pairs); err != nil {
				environment.mu.Unlock()
				return nil, err
			}
			environment.lease = mine
			environment.mu.Unlock()
			return mine.end, nil
		}
		environment.mu.Unlock()
		timer := time.NewTimer(leaseTime)
		select {
		case <-current.ended:
			timer.Stop()
		case <-timer.C:
			current.end()
		}
	}
}

// end puts the old values back, once.
func (l *lease) end() {
	environment.mu.Lock()
	defer environment.mu.Unlock()
	if environment.lease == l {
		environment.lease = nil
		l.restore()
		close(l.ended)
	}
}

func setEnv(pairs []string) (restore func(), err error) {
	type old struct {
		name, value string
		was         bool
	}
	var olds []old
	restore = func() {
		for _, o := range olds {
			if o.was {
				_ = os.Setenv(o.name, o.value) // it was a valid name before
			} else {
				_ = os.Unsetenv(o.name)
			}
		}
	}
	for _, pair := range pairs {
		name, value, _ := strings.Cut(pair, "=")
		before, was := os.LookupEnv(name)
		if err := os.Setenv(name, value); err != nil {
			restore()
			return nil, fail(ErrConfig, err, "setting %s for a PKCS#11 library", name)
		}
		olds = append(olds, old{name, before, was})
	}
	return restore, nil
}
