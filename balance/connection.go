package balance

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
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
		b, err := m.takeBridge()
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
			m.keepBridge(c.bridge)
		}
		return nil, err
	}
	c.pool = pool
	return c, nil
}

// takeBridge starts a bridge, or takes one that is free: a private instance of
// the client library is good for one bridge, and cannot be unloaded, so that both
// are used again.
func (m *member) takeBridge() (*bridge.Bridge, error) {
	m.mu.Lock()
	if n := len(m.bridges); n > 0 {
		b := m.bridges[n-1]
		m.bridges = m.bridges[:n-1]
		m.mu.Unlock()
		return b, nil
	}
	m.mu.Unlock()
	s := m.balancer.settings
	return bridge.Start(context.Background(), bridge.Config{
		Address: net.JoinHostPort(m.endpoint.Host, strconv.Itoa(int(m.endpoint.Port))),
		TLS:     s.tls, Plaintext: s.Plaintext,
		DialTimeout: s.opTimeout() * 3 / 4, // so that it can say why before nobody waits any more
	})
}

func (m *member) keepBridge(b *bridge.Bridge) {
	b.Disconnect()
	m.mu.Lock()
	closed := m.closed
	if !closed {
		m.bridges = append(m.bridges, b)
	}
	m.mu.Unlock()
	if closed {
		_ = b.Close() // nothing goes over it
	}
}

// room reports whether one more session can be opened.
func (c *connection) room() bool {
	s := c.pool.Stats()
	return s.Open < s.Limit
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
