package balance

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/hsmkey/hsmkey/internal/bridge"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// connection is one way to an endpoint: a pool, and the bridge that it goes
// over where p11-kit's protocol is spoken.
type connection struct {
	pool    *sessionpool.Pool
	bridge  *bridge.Bridge
	private bool // it rests on an instance of the library of its own
}

// connect opens a connection. It logs in only when it is used.
func (m *member) connect() (*connection, error) {
	s := m.balancer.settings
	cfg := s.Pool
	cfg.Name, cfg.PINGuard = m.name, m.balancer.guard
	c := &connection{}
	cfg.OnEvent = func(event sessionpool.Event) { m.notice(c, event) }
	switch e := m.endpoint; {
	case e.ModulePath != "":
		if cfg.Module != e.ModulePath {
			cfg.Module, cfg.ModuleArgs = e.ModulePath, "" // the string is for another library
		}
		cfg.TokenLabel, cfg.TokenSerial, cfg.Slot = e.Token, e.Serial, e.Slot
		if pin := e.PINValue(); pin != "" {
			cfg.PIN = sessionpool.StaticPIN(pin)
		} else if e.PINSource != "" {
			cfg.PIN = sessionpool.PINFile(e.PINSource)
		}
	case s.Remote == RemoteModule:
		cfg.Private, cfg.ModuleEnv = true, slices.Concat(cfg.ModuleEnv, s.environment(e))
	default:
		b, err := m.balancer.bridges.take(bridge.Config{
			Address: net.JoinHostPort(e.Host, strconv.Itoa(int(e.Port))),
			TLS:     s.tls, Plaintext: s.Plaintext,
			DialTimeout: s.opTimeout() * 3 / 4, // so that it can say why before nobody waits any more
		})
		if err != nil {
			return nil, err
		}
		c.bridge = b
		cfg.Module, cfg.ModuleArgs, cfg.Private, cfg.Direct = s.client, "", true, false
		cfg.ModuleEnv = []string{"P11_KIT_SERVER_ADDRESS=" + b.ServerAddress()}
		cfg.Plaintext = s.tls == nil
		cfg.MaxSessions = 1
	}
	c.private = cfg.Private
	pool, err := sessionpool.New(cfg)
	if err != nil {
		err = c.explain(err)
		if c.bridge != nil {
			m.balancer.bridges.keep(c.bridge)
		}
		return nil, err
	}
	c.pool = pool
	return c, nil
}

// bridges are those that lead nowhere at the moment. A private instance of the
// client library is good for one bridge and cannot be unloaded, so both are kept
// for the next connection, to whichever endpoint.
type bridges struct {
	mu     sync.Mutex
	free   []*bridge.Bridge
	closed bool
}

// take takes a bridge and makes it lead to a place, or starts one.
func (p *bridges) take(c bridge.Config) (*bridge.Bridge, error) {
	p.mu.Lock()
	n := len(p.free)
	if n == 0 {
		p.mu.Unlock()
		return bridge.Start(context.Background(), c)
	}
	b := p.free[n-1]
	p.free = p.free[:n-1]
	p.mu.Unlock()
	if err := b.Redirect(context.Background(), c); err != nil {
		p.keep(b)
		return nil, err
	}
	return b, nil
}

func (p *bridges) keep(b *bridge.Bridge) {
	b.Disconnect()
	p.mu.Lock()
	closed := p.closed
	if !closed {
		p.free = append(p.free, b)
	}
	p.mu.Unlock()
	if closed {
		_ = b.Close() // nothing goes over it
	}
}

func (p *bridges) close() {
	p.mu.Lock()
	free := p.free
	p.free, p.closed = nil, true
	p.mu.Unlock()
	for _, b := range free {
		_ = b.Close() // nothing goes over it
	}
}

// room reports whether one more session can be opened, if need be in the place of
// one of another kind that nobody uses.
func (c *connection) room() bool {
	s := c.pool.Stats()
	return s.InUse < s.Limit
}

// look opens a session, or finds a free one, and gives it back.
func (c *connection) look(opts ...sessionpool.Option) error {
	s, err := c.pool.Acquire(context.Background(), append(opts, sessionpool.NoWait())...)
	if err == nil {
		s.Release()
	}
	return c.explain(err)
}

// explain adds what happened on the network, of which PKCS#11 says nothing.
func (c *connection) explain(err error) error {
	if err == nil || c.bridge == nil || errors.Is(err, sessionpool.ErrUnsuitable) {
		return err
	}
	if last := c.bridge.Stats().LastError; last != nil {
		return fmt.Errorf("%w (%w)", err, last)
	}
	return err
}

// hangs reports whether calls hang that only another instance of the library can
// do without.
func (c *connection) hangs() bool { return c.private && c.pool.Stats().Orphans > 0 }

// close ends a connection once its sessions are released. Calls that hang then
// are cut off where that is possible.
func (c *connection) close(opTimeout time.Duration) error {
	if c.bridge != nil {
		tick := time.NewTicker(opTimeout)
		defer tick.Stop()
		done := make(chan struct{})
		defer close(done)
		go func() {
			for {
				select {
				case <-tick.C:
					if c.pool.Stats().InUse == 0 {
						c.bridge.Disconnect()
					}
				case <-done:
					return
				}
			}
		}()
	}
	return c.pool.Close(context.Background())
}
