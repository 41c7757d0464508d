package testhsm

import (
	"net"
	"strings"
	"sync"
	"testing"
)

// Proxy carries connections to an address, until it resets them.
type Proxy struct {
	Address string // where it listens

	to   string
	mu   sync.Mutex
	open map[*net.TCPConn]bool
}

// NewProxy listens at an address, of which port 0 stands for a free one, until the
// test ends.
func NewProxy(tb testing.TB, address, to string) *Proxy {
	tb.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		tb.Fatal(err)
	}
	p := &Proxy{Address: l.Addr().String(), to: to, open: map[*net.TCPConn]bool{}}
	var group sync.WaitGroup
	group.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			group.Go(func() { p.carry(conn.(*net.TCPConn)) }) //nolint:errcheck // by TCP it came
		}
	})
	tb.Cleanup(func() {
		_ = l.Close()
		p.Reset()
		group.Wait()
	})
	return p
}

func (p *Proxy) carry(from *net.TCPConn) {
	defer func() { _ = from.Close() }()
	conn, err := net.Dial("tcp", p.to)
	if err != nil {
		return
	}
	to := conn.(*net.TCPConn) //nolint:errcheck // by TCP it went
	defer func() { _ = to.Close() }()
	p.mu.Lock()
	p.open[from] = true
	p.mu.Unlock()
	done := make(chan struct{})
	go func() {
		_, _ = to.ReadFrom(from)
		_ = to.CloseWrite()
		close(done)
	}()
	_, _ = from.ReadFrom(to)
	_ = from.CloseWrite()
	_ = to.Close()
	<-done
	p.mu.Lock()
	delete(p.open, from)
	p.mu.Unlock()
}

// Reset ends every connection by RST, and tells how many there were.
func (p *Proxy) Reset() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	for conn := range p.open {
		_ = conn.SetLinger(0)
		_ = conn.Close()
	}
	defer clear(p.open)
	return len(p.open)
}

// ListLine is what a balance list says of an address.
func ListLine(address string) string {
	colon := strings.LastIndexByte(address, ':')
	return strings.Trim(address[:colon], "[]") + " " + address[colon+1:] + "\n"
}
