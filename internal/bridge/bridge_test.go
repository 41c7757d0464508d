package bridge_test

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hsmkey/hsmkey/internal/bridge"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// hostOf runs serve on each connection to a TCP address of its own.
func hostOf(t *testing.T, serve func(*net.TCPConn)) (address string) {
	t.Helper()
	listener, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.AcceptTCP()
			if err != nil {
				return
			}
			serve(conn)
		}
	}()
	t.Cleanup(func() {
		listener.Close()
		<-done
	})
	return listener.Addr().String()
}

func connect(t *testing.T, b *bridge.Bridge) *net.UnixConn {
	t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: b.SocketPath(), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func exchange(t *testing.T, conn net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != text {
		t.Fatalf("got %q, %v; want %q", got, err, text)
	}
}

// eventually waits for what another goroutine does next.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

func TestAResetByTheHostClosesTheClientsSide(t *testing.T) {
	b := start(t, bridge.Config{Address: hostOf(t, func(conn *net.TCPConn) {
		_, _ = conn.Read(make([]byte, 1))
		_ = conn.SetLinger(0) // closing sends a reset
		conn.Close()
	})})
	client := connect(t, b)
	if _, err := client.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if n, err := client.Read(make([]byte, 1)); err == nil {
		t.Errorf("read %d bytes from a connection that was reset", n)
	}
	eventually(t, "the connection is over", func() bool { return b.Stats().Active == 0 })
	if stats := b.Stats(); stats.Failures != 1 || stats.LastError == nil {
		t.Errorf("stats: %+v", stats)
	}
}

func TestAResetIsNoticedByAClientThatOnlyWrites(t *testing.T) {
	b := start(t, bridge.Config{Address: hostOf(t, func(conn *net.TCPConn) {
		go func() {
			_, _ = conn.Read(make([]byte, 1))
			_ = conn.SetLinger(0)
			conn.Close()
		}()
		_, _ = conn.Write(make([]byte, 64<<20)) // more than anybody buffers
	})})
	client := connect(t, b)
	eventually(t, "writing fails", func() bool {
		_, err := client.Write([]byte("x"))
		return err != nil
	})
	if stats := b.Stats(); stats.Failures != 1 || stats.LastError == nil {
		t.Errorf("stats: %+v", stats)
	}
}

func TestWhatIsUnderWayArrivesAfterTheClientEnded(t *testing.T) {
	b := start(t, bridge.Config{Address: hostOf(t, func(conn *net.TCPConn) {
		defer conn.Close()
		request, _ := io.ReadAll(conn) // to the client's end of stream
		slices.Reverse(request)
		_, _ = conn.Write(request)
	})})
	client := connect(t, b)
	request := strings.Repeat("0123456789", 100_000)
	if _, err := io.WriteString(client, request); err != nil {
		t.Fatal(err)
	}
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(client)
	if want := strings.Repeat("9876543210", 100_000); err != nil || string(answer) != want {
		t.Errorf("got %d bytes, %v; want %d", len(answer), err, len(want))
	}
	eventually(t, "the connection is over", func() bool { return b.Stats().Active == 0 })
	if stats := b.Stats(); stats.Failures != 0 {
		t.Errorf("stats: %+v", stats)
	}
}

func TestWhatIsUnderWayArrivesAfterTheHostEnded(t *testing.T) {
	received := make(chan string, 1)
	b := start(t, bridge.Config{Address: hostOf(t, func(conn *net.TCPConn) {
		defer conn.Close()
		_, _ = io.WriteString(conn, "bye")
		_ = conn.CloseWrite()
		rest, _ := io.ReadAll(conn)
		received <- string(rest)
	})})
	client := connect(t, b)
	if answer, err := io.ReadAll(client); err != nil || string(answer) != "bye" {
		t.Errorf("got %q, %v", answer, err)
	}
	if err := b.Stats().LastError; err == nil {
		t.Error("the end of the host's stream, before the client's, is no failure")
	}
	if _, err := io.WriteString(client, "rest"); err != nil {
		t.Fatal(err)
	}
	client.Close()
	if got := <-received; got != "rest" {
		t.Errorf("host received %q", got)
	}
}

func TestAClientThatEndedIsNotKeptByAHostThatHangs(t *testing.T) {
	hang := make(chan struct{})
	address := hostOf(t, func(conn *net.TCPConn) {
		defer conn.Close()
		<-hang
	})
	t.Cleanup(func() { close(hang) })
	b := start(t, bridge.Config{Address: address})
	connect(t, b).Close()
	eventually(t, "the connection is made", func() bool { return b.Stats().Connections == 1 })
	eventually(t, "the connection is over", func() bool { return b.Stats().Active == 0 })
}

func TestAnIdleClientIsNotKeptWhenTheHostEnded(t *testing.T) {
	b := start(t, bridge.Config{Address: hostOf(t, func(conn *net.TCPConn) { conn.Close() })})
	connect(t, b)
	eventually(t, "the connection is made", func() bool { return b.Stats().Connections == 1 })
	eventually(t, "the connection is over", func() bool { return b.Stats().Active == 0 })
	if err := b.Stats().LastError; err == nil || !strings.Contains(err.Error(), "closed by the HSM's host") {
		t.Errorf("last error: %v", err)
	}
}

func TestCloseEndsEverything(t *testing.T) {
	address := hostOf(t, func(conn *net.TCPConn) {
		defer conn.Close()
		_, _ = io.Copy(conn, conn)
	})
	b, err := bridge.Start(t.Context(), bridge.Config{Address: address})
	if err != nil {
		t.Fatal(err)
	}
	client := connect(t, b)
	exchange(t, client, "hello")
	for range 2 { // closing again does nothing
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := client.Read(make([]byte, 1)); err == nil {
		t.Error("the client's connection is still open")
	}
	if _, err := os.Stat(filepath.Dir(b.SocketPath())); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory of the socket is still there: %v", err)
	}
	if stats := b.Stats(); stats.Active != 0 || stats.Failures != 0 {
		t.Errorf("stats: %+v", stats)
	}
}

// mute is a host that accepts connections and never says anything, so that TLS
// handshakes with it do not end.
func mute(t *testing.T) (address string, accepted *atomic.Int32) {
	t.Helper()
	accepted = new(atomic.Int32)
	return hostOf(t, func(conn *net.TCPConn) {
		accepted.Add(1)
		defer conn.Close()
		_, _ = io.Copy(io.Discard, conn)
	}), accepted
}

func TestCloseDoesNotWaitForDialling(t *testing.T) {
	address, accepted := mute(t)
	b, err := bridge.Start(t.Context(), bridge.Config{
		Address: address, TLS: loadTLS(t, testhsm.NewTLSFiles(t)), DialTimeout: time.Hour,
	})
	if err != nil {
		t.Fatal(err)
	}
	connect(t, b)
	eventually(t, "the bridge dials", func() bool { return accepted.Load() == 1 })
	if err := b.Close(); err != nil { // or the test runs for an hour
		t.Error(err)
	}
}

func TestDiallingTimesOut(t *testing.T) {
	address, _ := mute(t)
	b := start(t, bridge.Config{
		Address: address, TLS: loadTLS(t, testhsm.NewTLSFiles(t)), DialTimeout: 50 * time.Millisecond,
	})
	if _, err := connect(t, b).Read(make([]byte, 1)); err == nil {
		t.Error("connected to a host that does not answer")
	}
	if err := b.Stats().LastError; !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("last error: %v", err)
	}
}

func TestTheSocketIsPrivate(t *testing.T) {
	b := start(t, bridge.Config{Address: "127.0.0.1:1"})
	info, err := os.Stat(filepath.Dir(b.SocketPath()))
	if err != nil {
		t.Fatal(err)
	}
	if mode := info.Mode().Perm(); mode != 0o700 {
		t.Errorf("mode of the directory: %o", mode)
	}
}

func TestADeepTemporaryDirectoryIsNoObstacle(t *testing.T) {
	deep := filepath.Join(t.TempDir(), strings.Repeat("d", 100))
	if err := os.Mkdir(deep, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", deep)
	connect(t, start(t, bridge.Config{Address: "127.0.0.1:1"}))
}

func TestWithoutATemporaryDirectoryThereIsNoBridge(t *testing.T) {
	t.Setenv("TMPDIR", "/nonexistent") // short: for a long one there is /tmp
	if _, err := bridge.Start(t.Context(), bridge.Config{Address: "127.0.0.1:1"}); !errors.Is(err, sessionpool.ErrSession) {
		t.Errorf("error: %v, want ErrSession", err)
	}
}

func TestTheServerAddressIsEncodedForP11Kit(t *testing.T) {
	dir, err := os.MkdirTemp("", "50% of a;b") // t.TempDir would be too long
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	t.Setenv("TMPDIR", dir)
	s := testhsm.Remote(t, testhsm.NewDetached(t), "127.0.0.2:0")
	b := start(t, bridge.Config{Address: s.Address})
	if !strings.HasPrefix(b.SocketPath(), dir) {
		t.Fatalf("the socket is at %s", b.SocketPath())
	}
	if out, err := tool(clientOf(t, s, b), "--list-slots"); err != nil {
		t.Errorf("%s: %v\n%s", b.ServerAddress(), err, out)
	}
}

func TestImpossibleConfigurationsAreRefused(t *testing.T) {
	for name, config := range map[string]bridge.Config{
		"no address":       {},
		"no port":          {Address: "127.0.0.1"},
		"no host":          {Address: ":4433"},
		"port 0":           {Address: "127.0.0.1:0"},
		"large port":       {Address: "127.0.0.1:65536"},
		"service name":     {Address: "127.0.0.1:https"},
		"negative timeout": {Address: "127.0.0.1:4433", DialTimeout: -1},
		"absurd timeout":   {Address: "127.0.0.1:4433", DialTimeout: 1000 * time.Hour},
	} {
		if b, err := bridge.Start(t.Context(), config); !errors.Is(err, sessionpool.ErrConfig) {
			t.Errorf("%s: %v, want ErrConfig", name, err)
			if err == nil {
				b.Close()
			}
		}
	}
}

// resolveTo makes names resolve to what addresses returns, for this process and
// until the test ends: a DNS server of one answer, spoken to over a pipe.
func resolveTo(t *testing.T, addresses func() []string) {
	t.Helper()
	before := net.DefaultResolver
	t.Cleanup(func() { net.DefaultResolver = before })
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		resolver, server := net.Pipe()
		go func() {
			defer server.Close()
			length := make([]byte, 2) // DNS over a stream: each message has its length in front
			if _, err := io.ReadFull(server, length); err != nil {
				return
			}
			query := make([]byte, binary.BigEndian.Uint16(length))
			if _, err := io.ReadFull(server, query); err != nil {
				return
			}
			// Header of 12 bytes, then the question: name, type and class.
			end := 12 + slices.Index(query[12:], 0) + 1
			question := query[12 : end+4]
			var answers []byte
			count := 0
			if binary.BigEndian.Uint16(query[end:]) == 1 { // type A
				for _, address := range addresses() {
					answers = append(answers, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4)
					answers = append(answers, net.ParseIP(address).To4()...)
					count++
				}
			}
			message := append([]byte{query[0], query[1], 0x81, 0x80, 0, 1, 0, byte(count), 0, 0, 0, 0}, question...)
			message = append(message, answers...)
			_, _ = server.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(message))), message...))
		}()
		return resolver, nil
	}}
}

func TestPlainTCPLeadsToLoopbackAddressesOnly(t *testing.T) {
	resolved := map[string][]string{
		"here.example":  {"127.0.0.1", "127.0.0.2"},
		"there.example": {"192.0.2.1"},
		"both.example":  {"127.0.0.1", "192.0.2.1"},
	}
	for host, allowed := range map[string]bool{
		"127.0.0.1":          true,
		"127.255.255.254":    true,
		"::1":                true,
		"::ffff:127.0.0.1":   true,
		"localhost":          true,
		"here.example":       true,
		"0.0.0.0":            false,
		"128.0.0.1":          false,
		"10.0.20.1":          false,
		"::":                 false,
		"::ffff:192.0.2.1":   false,
		"fe80::1%eth0":       false,
		"2001:db8::1":        false,
		"there.example":      false,
		"both.example":       false,
		"unresolved.example": false,
	} {
		t.Run(host, func(t *testing.T) {
			resolveTo(t, func() []string { return resolved[host] })
			config := bridge.Config{Address: net.JoinHostPort(host, "4433")}
			b, err := bridge.Start(t.Context(), config)
			if err == nil {
				b.Close()
			}
			want := sessionpool.ErrConfig
			if host == "unresolved.example" {
				want = sessionpool.ErrSession
			}
			if allowed && err != nil || !allowed && !errors.Is(err, want) {
				t.Errorf("plain TCP: %v", err)
			}

			config.Plaintext = true
			start(t, config)
			config.Plaintext, config.TLS = false, loadTLS(t, testhsm.NewTLSFiles(t))
			start(t, config)
		})
	}
}

func TestANameThatLeadsElsewhereLaterIsNotFollowed(t *testing.T) {
	var moved atomic.Bool
	resolveTo(t, func() []string {
		if moved.Load() {
			return []string{"192.0.2.1"}
		}
		return []string{"127.0.0.2"}
	})
	address := hostOf(t, func(conn *net.TCPConn) {
		defer conn.Close()
		_, _ = io.Copy(conn, conn)
	})
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	b := start(t, bridge.Config{Address: "hsm.example:" + port})
	client := connect(t, b)
	exchange(t, client, "hello")
	client.Close()

	moved.Store(true)
	if _, err := connect(t, b).Read(make([]byte, 1)); err == nil {
		t.Error("connected")
	}
	if err := b.Stats().LastError; !errors.Is(err, sessionpool.ErrConfig) {
		t.Errorf("last error: %v, want ErrConfig", err)
	}
}
