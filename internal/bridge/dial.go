package bridge

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"time"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// keepAlive notices a peer that went away without a word, or a firewall that
// forgot the connection, within half a minute instead of two hours.
var keepAlive = net.KeepAliveConfig{
	Enable:   true,
	Idle:     15 * time.Second,
	Interval: 5 * time.Second,
	Count:    3,
}

// unacknowledgedTimeout is the same for a peer that goes away under a call,
// where keep-alive does not apply: TCP repeats itself for a quarter of an hour.
const unacknowledgedTimeout = 30 * time.Second

// halfCloser is a connection that can end what it sends and still receive:
// *net.UnixConn, *net.TCPConn and *tls.Conn.
type halfCloser interface {
	net.Conn
	CloseWrite() error
}

// dialer connects to one address.
type dialer struct {
	address string
	timeout time.Duration
	dialer  net.Dialer // Go sets TCP_NODELAY on each TCP connection
	tls     *tls.Config
}

// newDialer checks a configuration.
func newDialer(ctx context.Context, config Config) (*dialer, error) {
	host, port, err := net.SplitHostPort(config.Address)
	if err != nil {
		return nil, configError("HSM address: %w", err)
	}
	if number, err := strconv.ParseUint(port, 10, 16); err != nil || number == 0 || host == "" {
		return nil, configError("HSM address %q is not host:port with a port of 1 to 65535", config.Address)
	}
	if config.DialTimeout < 0 || config.DialTimeout > maxDialTimeout {
		return nil, configError("DialTimeout is %v, want 0 (default) to %v", config.DialTimeout, maxDialTimeout)
	}
	d := &dialer{address: config.Address, timeout: cmp.Or(config.DialTimeout, DefaultDialTimeout)}
	d.dialer.KeepAliveConfig = keepAlive
	d.dialer.Control = func(_, _ string, raw syscall.RawConn) error {
		return setUnacknowledgedTimeout(raw, unacknowledgedTimeout)
	}
	switch {
	case config.TLS != nil:
		d.tls = config.TLS.Clone()
		d.tls.MinVersion = max(d.tls.MinVersion, tls.VersionTLS13)
		if d.tls.ServerName == "" {
			d.tls.ServerName = host
		}
	case !config.Plaintext:
		ctx, cancel := context.WithTimeout(ctx, d.timeout)
		defer cancel()
		if err := requireLoopback(ctx, host); err != nil {
			return nil, err
		}
		// A name may lead elsewhere when it is resolved next, so each address
		// is looked at again before it is connected to.
		d.dialer.Control = func(_, address string, raw syscall.RawConn) error {
			if to, err := netip.ParseAddrPort(address); err != nil || !to.Addr().IsLoopback() {
				return configError("%s now leads to %s: %w", config.Address, address, errPlaintext)
			}
			return setUnacknowledgedTimeout(raw, unacknowledgedTimeout)
		}
	}
	return d, nil
}

var errPlaintext = errors.New("PINs would travel there in the clear (use TLS, or allow it with HSM_REMOTE_PLAINTEXT=1)")

// requireLoopback refuses a host that is not this machine, or not surely.
func requireLoopback(ctx context.Context, host string) error {
	var addrs []netip.Addr
	if addr, err := netip.ParseAddr(host); err == nil {
		addrs = []netip.Addr{addr}
	} else if addrs, err = net.DefaultResolver.LookupNetIP(ctx, "ip", host); err != nil {
		return fmt.Errorf("%w: cannot tell whether %s is this machine: %w", sessionpool.ErrSession, host, err)
	}
	for _, addr := range addrs {
		if !addr.IsLoopback() {
			return configError("%s is not a loopback address: %w", host, errPlaintext)
		}
	}
	return nil
}

// dial connects, and returns when the HSM's host can be spoken to: under TLS,
// when it has proven who it is.
func (d *dialer) dial(ctx context.Context) (halfCloser, error) {
	connect, by := d.dialer.DialContext, ""
	if d.tls != nil {
		connect, by = (&tls.Dialer{NetDialer: &d.dialer, Config: d.tls}).DialContext, " by TLS"
	}
	conn, err := connect(ctx, "tcp", d.address)
	if err != nil {
		return nil, fmt.Errorf("cannot connect to %s%s: %w", d.address, by, err)
	}
	return conn.(halfCloser), nil //nolint:errcheck // *net.TCPConn or *tls.Conn
}
