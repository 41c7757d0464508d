package balance

import (
	"context"
	"errors"
	"net"
	"strconv"

	"github.com/hsmkey/hsmkey/internal/bridge"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// connection is one way to an endpoint: a pool, and the bridge that it goes
// over where p11-kit's protocol is spoken.
type connection struct {
	pool   *sessionpool.Pool
	bridge *bridge.Bridge
}

// connect opens a connection. It logs in only when it is used.
func (m *member) connect(ctx context.Context) (*connection, error) {
	cfg := m.settings.Pool
	cfg.Name, cfg.PINGuard, cfg.OnEvent = m.name, m.guard, nil
	c := &connection{}
	e := m.endpoint
	switch {
	case e.ModulePath != "":
		cfg.Module, cfg.TokenLabel, cfg.TokenSerial, cfg.Slot = e.ModulePath, e.Token, e.Serial, e.Slot
		if pin := e.PINValue(); pin != "" {
			cfg.PIN = sessionpool.StaticPIN(pin)
		} else if e.PINSource != "" {
			cfg.PIN = sessionpool.PINFile(e.PINSource)
		}
	case m.settings.Remote == RemoteModule:
		cfg.Private, cfg.ModuleEnv = true, m.settings.environment(e)
	default:
		b, err := m.takeBridge(ctx)
		if err != nil {
			return nil, err
		}
		c.bridge = b
		cfg.Module, cfg.ModuleArgs, cfg.Private = m.settings.client, "", true
		cfg.ModuleEnv = []string{"P11_KIT_SERVER_ADDRESS=" + b.ServerAddress()}
		cfg.Plaintext = m.settings.tls == nil
		cfg.MaxSessions = 1
	}
	cfg.OnEvent = func(event sessionpool.Event) { m.notice(c, event) }
	pool, err := sessionpool.New(cfg)
	if err != nil {
		if c.bridge != nil {
			err = errors.Join(err, c.bridge.Stats().LastError)
			m.keepBridge(c.bridge)
		}
		return nil, err
	}
	c.pool = pool
	return c, nil
}

// takeBridge starts a bridge, or takes one of an attempt that failed: a private
// instance of the client library is good for one bridge, and cannot be unloaded,
// so that both are used again.
func (m *member) takeBridge(ctx context.Context) (*bridge.Bridge, error) {
	m.mu.Lock()
	if n := len(m.bridges); n > 0 {
		b := m.bridges[n-1]
		m.bridges = m.bridges[:n-1]
		m.mu.Unlock()
		return b, nil
	}
	m.mu.Unlock()
	return bridge.Start(ctx, bridge.Config{
		Address: net.JoinHostPort(m.endpoint.Host, strconv.Itoa(int(m.endpoint.Port))),
		TLS:     m.settings.tls, Plaintext: m.settings.Plaintext,
		DialTimeout: m.settings.Pool.OpTimeout,
	})
}

func (m *member) keepBridge(b *bridge.Bridge) {
	b.Disconnect()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		_ = b.Close() // nothing goes over it
		return
	}
	m.bridges = append(m.bridges, b)
}

// close ends a connection for good.
func (c *connection) close(ctx context.Context) error {
	err := c.pool.Close(ctx)
	if c.bridge != nil {
		err = errors.Join(err, c.bridge.Close())
	}
	return err
}
