// Package bridge brings an HSM at a network address into reach of
// p11-kit-client.so, which speaks p11-kit's RPC protocol to unix sockets only.
//
// A Bridge listens on a socket in a directory of its own, which nobody but this
// user can enter, and carries each connection to the address, by TLS 1.3 with
// mutual authentication or by TCP. It does not look into what it carries. Each
// connection of the client library becomes one connection to the HSM, so a call
// that hangs holds up only its own.
//
// When the HSM's side of a connection breaks, the client's side is closed at
// once: p11-kit then answers CKR_DEVICE_ERROR to the call under way and to all
// that follow, until it is finalised and initialised again, which connects anew.
package bridge

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// DefaultDialTimeout is the DialTimeout of a Config that has none.
const DefaultDialTimeout = 10 * time.Second

const (
	maxDialTimeout = time.Hour

	// A unix socket's path has room for so many bytes on every system we know
	// (107 on Linux, 103 on macOS).
	maxSocketPath = 103

	// acceptPause is how long to wait before accepting again after that failed,
	// which is when the process has no file descriptor left.
	acceptPause = 50 * time.Millisecond
)

// Config says where a bridge leads.
type Config struct {
	// Address is the HSM's "host:port".
	Address string

	// TLS, when set, is the way to speak TLS to the HSM; see LoadTLS. An empty
	// ServerName is replaced by the host, a MinVersion below TLS 1.3 by that.
	TLS *tls.Config

	// Plaintext allows to go without TLS to any address. Without it plain TCP
	// leads to loopback addresses only: PINs travel there.
	Plaintext bool

	// DialTimeout limits connecting to the HSM, with name resolution and the
	// TLS handshake, and once more the wait for the server's first answer.
	// Zero: DefaultDialTimeout.
	DialTimeout time.Duration
}

// Stats is a snapshot of a bridge.
type Stats struct {
	Active      int    // connections that are open now, those being dialled included
	Connections uint64 // connections accepted so far
	Failures    uint64 // those of them that could not be made or broke

	// LastError says why the latest of the failures happened. It is nil again
	// as soon as a connection to the HSM was made.
	LastError error
}

// Bridge is a running bridge. Its methods may be called concurrently.
type Bridge struct {
	listener *net.UnixListener
	dir      string

	// ctx ends when Close is called; goroutines are the accept loop and those
	// of the connections, and Close waits for them.
	ctx        context.Context
	cancel     context.CancelFunc
	goroutines sync.WaitGroup
	closing    sync.Once
	closeErr   error

	mu          sync.Mutex
	dialer      *dialer
	open        map[net.Conn]struct{} // both ends of every connection; nil when closed
	connections uint64
	active      int
	failures    uint64
	lastError   error
}

// Start checks the configuration and listens. It does not connect to the HSM:
// that is for the client's connections, so a bridge can be started while its HSM
// is down. The context is for Start alone; the bridge runs until Close.
//
// The error matches [sessionpool.ErrConfig] where the configuration cannot work,
// plain TCP beyond loopback among that, and [sessionpool.ErrSession] where it may
// work later: the host's name could not be resolved to find that out, or there is
// no place for the socket.
func Start(ctx context.Context, config Config) (*Bridge, error) {
	d, err := newDialer(ctx, config)
	if err != nil {
		return nil, err
	}
	dir, listener, err := listen()
	if err != nil {
		return nil, fmt.Errorf("%w: cannot listen for the connections to %s: %w", sessionpool.ErrSession, config.Address, err)
	}
	b := &Bridge{
		dialer:   d,
		listener: listener,
		dir:      dir,
		open:     make(map[net.Conn]struct{}),
	}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	b.goroutines.Go(b.accept)
	return b, nil
}

// Redirect makes the bridge lead elsewhere from now on, and closes every
// connection. A client library can be bound to one socket only, and often not be
// unloaded: so both are used again. Errors are those of Start; then nothing has
// changed.
func (b *Bridge) Redirect(ctx context.Context, config Config) error {
	d, err := newDialer(ctx, config)
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dialer, b.lastError = d, nil
	b.closeOpen()
	return nil
}

// listen makes a socket in a new directory with mode 0700.
func listen() (dir string, listener *net.UnixListener, err error) {
	const pattern, name = "hsmkey-bridge-", "pkcs11"
	parent := os.TempDir()
	if len(parent)+len(pattern)+len(name)+len("/4294967295/") > maxSocketPath {
		parent = "/tmp"
	}
	if dir, err = os.MkdirTemp(parent, pattern); err != nil {
		return "", nil, err
	}
	listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name), Net: "unix"})
	if err != nil {
		return "", nil, errors.Join(err, os.RemoveAll(dir))
	}
	return dir, listener, nil
}

// SocketPath returns the path of the socket that the bridge listens on.
func (b *Bridge) SocketPath() string { return b.listener.Addr().String() }

// ServerAddress returns the value of P11_KIT_SERVER_ADDRESS for p11-kit-client.so.
// The library reads that variable in C_GetFunctionList, when it is loaded, and
// not again in C_Initialize.
func (b *Bridge) ServerAddress() string {
	return "unix:path=" + (&url.URL{Path: b.SocketPath()}).EscapedPath()
}

// Stats returns a snapshot.
func (b *Bridge) Stats() Stats {
	b.mu.Lock()
	defer b.mu.Unlock()
	return Stats{Active: b.active, Connections: b.connections, Failures: b.failures, LastError: b.lastError}
}

// Disconnect closes every connection at once; the bridge goes on and accepts new
// ones. PKCS#11 calls that hang in a connection return with CKR_DEVICE_ERROR.
func (b *Bridge) Disconnect() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closeOpen()
}

// closeOpen closes every connection; the goroutines that use them see the end.
// The caller holds mu.
func (b *Bridge) closeOpen() {
	for conn := range b.open {
		_ = conn.Close()
	}
}

// Close closes every connection, removes the socket, and returns when all
// goroutines of the bridge have ended. Closing again does nothing.
func (b *Bridge) Close() error {
	b.closing.Do(func() {
		b.cancel()
		b.closeErr = b.listener.Close()
		b.mu.Lock()
		b.closeOpen()
		b.open = nil
		b.mu.Unlock()
		b.goroutines.Wait()
		b.closeErr = errors.Join(b.closeErr, os.RemoveAll(b.dir))
	})
	return b.closeErr
}

// accept serves the socket until Close.
func (b *Bridge) accept() {
	for {
		client, err := b.listener.AcceptUnix()
		if err == nil {
			b.goroutines.Go(func() { b.serve(client) })
			continue
		}
		if errors.Is(err, net.ErrClosed) {
			return
		}
		b.fail(nil, fmt.Errorf("accept: %w", err))
		select {
		case <-time.After(acceptPause):
		case <-b.ctx.Done():
			return
		}
	}
}

// serve carries one connection of a client to the HSM, from beginning to end.
func (b *Bridge) serve(client *net.UnixConn) {
	b.mu.Lock()
	b.connections++
	b.active++
	d := b.dialer
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		b.active--
		b.mu.Unlock()
	}()
	if !b.track(client) {
		return
	}
	defer b.untrack(client)

	ctx, cancel := context.WithTimeout(b.ctx, d.timeout)
	server, err := d.dial(ctx)
	cancel()
	if err != nil {
		b.fail(d, err)
		return
	}
	if !b.track(server) {
		return
	}
	defer b.untrack(server)
	b.connected()

	carry(client, server, d.timeout, func(err error) {
		b.fail(d, fmt.Errorf("connection to %s: %w", d.address, err))
	})
}

// track makes Disconnect and Close find a connection. When the bridge is closed
// it closes the connection and reports false.
func (b *Bridge) track(conn net.Conn) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.open == nil {
		_ = conn.Close()
		return false
	}
	b.open[conn] = struct{}{}
	return true
}

func (b *Bridge) untrack(conn net.Conn) {
	_ = conn.Close()
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.open, conn)
}

func (b *Bridge) connected() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lastError = nil
}

// fail records a failure on the way by d, unless Close, Disconnect or Redirect is
// its reason.
func (b *Bridge) fail(d *dialer, err error) {
	if b.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if d != nil && d != b.dialer {
		return
	}
	b.failures++
	b.lastError = err
}

func configError(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{sessionpool.ErrConfig}, args...)...)
}
