package bridge

import (
	"net"
	"syscall"
	"testing"
)

// What the options are for needs a network that loses packets; here they are
// only read back.
func TestConnectionsHaveTheirOptions(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.2:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	for name, config := range map[string]Config{
		"loopback only": {},
		"plaintext":     {Plaintext: true},
	} {
		config.Address = listener.Addr().String()
		d, err := newDialer(t.Context(), config)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := d.dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		tcp, ok := conn.(*net.TCPConn)
		if !ok {
			t.Fatalf("%s: a %T", name, conn)
		}
		raw, err := tcp.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		for _, option := range []struct {
			name              string
			level, opt, value int
		}{
			{"TCP_NODELAY", syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1},
			{"SO_KEEPALIVE", syscall.SOL_SOCKET, syscall.SO_KEEPALIVE, 1},
			{"TCP_KEEPIDLE", syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE, 15},
			{"TCP_USER_TIMEOUT", syscall.IPPROTO_TCP, tcpUserTimeout, 30_000},
		} {
			err := raw.Control(func(fd uintptr) {
				value, err := syscall.GetsockoptInt(int(fd), option.level, option.opt)
				if err != nil || value != option.value {
					t.Errorf("%s: %s = %d, %v; want %d", name, option.name, value, err, option.value)
				}
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
}
