package testhsm

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// Server is an HSM in processes of its own: a p11-kit server, reached through
// p11-kit-client.so. It ends with the test. Its methods fail the test when they
// cannot do what they say, so call them from the test's goroutine.
type Server struct {
	// Address is where it listens: "unix:path=…" of Serve, which is what
	// P11_KIT_SERVER_ADDRESS wants, or "host:port" of Remote and RemoteTLS.
	Address string

	tb            testing.TB
	argv          []string
	env           []string
	network, dial string // how to reach the listening socket
	client        string // value of P11_KIT_SERVER_ADDRESS for the client library
	group         *group
	tokens        tokenFiles
}

// Serve runs `p11-kit server` for the tokens of the HSM on a unix socket, and
// returns when it accepts connections.
func Serve(tb testing.TB, h *HSM) *Server {
	tb.Helper()
	socket := filepath.Join(tempDir(tb), "pkcs11")
	s := &Server{
		Address: "unix:path=" + socket,
		tb:      tb,
		argv: append([]string{mustProgram(tb, "p11-kit", "p11-kit"), "server",
			"--foreground", "--provider", h.Module, "--name", socket}, h.tokenURIs()...),
		env:     h.environ(),
		tokens:  h.tokenFiles(tb),
		network: "unix",
		dial:    socket,
		client:  "unix:path=" + socket,
	}
	s.begin()
	return s
}

// Remote publishes the tokens of the HSM at a TCP address, as a host would that
// runs `p11-kit remote` behind socat, and returns when it accepts connections.
// The address is "host:port", with port 0 for a free one; each of 127.0.0.0/8 is
// a host of its own. PINs travel there in the clear: see RemoteTLS.
func Remote(tb testing.TB, h *HSM, address string) *Server {
	tb.Helper()
	address, listen, dial := socatAddresses(tb, address)
	return remote(tb, h, address, "TCP-LISTEN:"+listen, "TCP:"+dial)
}

// RemoteTLS is Remote over TLS 1.3 with mutual authentication: it serves only
// clients with a certificate of the files' CA.
func RemoteTLS(tb testing.TB, h *HSM, address string, files *TLSFiles) *Server {
	tb.Helper()
	address, listen, dial := socatAddresses(tb, address)
	return remote(tb, h, address,
		fmt.Sprintf("OPENSSL-LISTEN:%s,openssl-min-proto-version=TLS1.3,cert=%s,key=%s,cafile=%s,verify=1",
			listen, files.ServerCert, files.ServerKey, files.CA),
		// socat cannot check a certificate for an IPv4 address, but for a name.
		fmt.Sprintf("OPENSSL:%s,commonname=localhost,cert=%s,key=%s,cafile=%s,verify=1",
			dial, files.ClientCert, files.ClientKey, files.CA))
}

// remote runs socat between a listening address and p11-kit; client is socat's
// address for the way back.
func remote(tb testing.TB, h *HSM, address, listen, client string) *Server {
	tb.Helper()
	socat := mustProgram(tb, "socat", "socat")
	command := append([]string{mustProgram(tb, "p11-kit", "p11-kit"), "remote", "--provider", h.Module}, h.tokenURIs()...)
	s := &Server{
		Address: address,
		tb:      tb,
		// In quotes, because colons and commas mean something to socat.
		argv:    []string{socat, listen, "EXEC:'" + strings.Join(command, " ") + "'"},
		env:     h.environ(),
		tokens:  h.tokenFiles(tb),
		network: "tcp",
		dial:    address,
		// p11-kit's client speaks to a command's standard input and output, too.
		client: "|" + socat + " STDIO " + client,
	}
	s.begin()
	return s
}

// begin starts the server and its cleanup.
func (s *Server) begin() {
	s.tb.Helper()
	s.start()
	s.tb.Cleanup(func() {
		if err := errors.Join(s.group.kill(), s.tokens.mend()); err != nil {
			s.tb.Error(err)
		}
	})
}

// start runs the server and waits until it accepts connections.
func (s *Server) start() {
	s.tb.Helper()
	s.group = startGroup(s.tb, s.env, s.argv...)
	err := eventually(func() error {
		conn, err := net.Dial(s.network, s.dial)
		if err != nil && s.group.ended() {
			return nil // reported below, without waiting longer
		}
		if err == nil {
			err = conn.Close()
		}
		return err
	})
	if err != nil || s.group.ended() {
		log, _ := os.ReadFile(s.group.log)
		s.tb.Fatalf("testhsm: %s does not serve at %s: %v\n%s", filepath.Base(s.argv[0]), s.Address, err, log)
	}
}

// Client returns the path of p11-kit's client library and sets
// P11_KIT_SERVER_ADDRESS, until the test ends, so that it speaks to this server.
// The library reads that when it is loaded; each call returns a private copy, so
// that several servers can be used side by side: load each before asking for the
// next. Like New, Client cannot be used by parallel tests.
func (s *Server) Client() (modulePath string) {
	s.tb.Helper()
	modulePath = privateCopy(s.tb, p11Module(s.tb, "p11-kit-client.so", "p11-kit-modules"))
	s.tb.Setenv("P11_KIT_SERVER_ADDRESS", s.client)
	return modulePath
}

// Stop freezes the server (SIGSTOP): connections are still accepted by the
// kernel, calls hang. When it returns no call gets an answer any more.
func (s *Server) Stop() {
	s.tb.Helper()
	s.check(s.group.signal(syscall.SIGSTOP, stopped))
}

// Continue lets a stopped server go on (SIGCONT) with the calls that wait.
func (s *Server) Continue() {
	s.tb.Helper()
	s.check(s.group.signal(syscall.SIGCONT, running))
}

// Kill ends the server with all its connections (SIGKILL), stopped or not. When
// it returns connections are refused. Killing a dead server does nothing.
func (s *Server) Kill() {
	s.tb.Helper()
	s.check(errors.Join(s.group.kill(), s.tokens.mend()))
}

// Restart kills the server if it still runs, starts it again at the same
// address, and returns when it accepts connections.
func (s *Server) Restart() {
	s.tb.Helper()
	s.Kill()
	s.start()
}

func (s *Server) check(err error) {
	s.tb.Helper()
	if err != nil {
		s.tb.Fatal(err)
	}
}

// socatAddresses replaces port 0 by a free one, and returns the address also as
// socat's listening and connecting addresses take it. Without nodelay at both
// ends each call waits 40 ms for an acknowledgement.
func socatAddresses(tb testing.TB, address string) (hostPort, listen, dial string) {
	tb.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		tb.Fatalf("testhsm: %v", err)
	}
	if err := l.Close(); err != nil {
		tb.Fatalf("testhsm: %v", err)
	}
	hostPort = l.Addr().String()
	host, port, err := net.SplitHostPort(hostPort)
	if err != nil {
		tb.Fatalf("testhsm: %v", err)
	}
	family := "ip4"
	if strings.Contains(host, ":") {
		host, family = "["+host+"]", "ip6"
	}
	return hostPort, port + ",pf=" + family + ",bind=" + host + ",fork,reuseaddr,nodelay",
		host + ":" + port + ",pf=" + family + ",nodelay"
}

// tokenURIs returns the PKCS#11 URIs of the HSM's tokens.
func (h *HSM) tokenURIs() []string {
	uris := make([]string, len(h.Labels))
	for i, label := range h.Labels {
		uris[i] = tokenURI(label)
	}
	return uris
}
