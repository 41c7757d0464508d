package bridge

import (
	"syscall"
	"time"
)

// tcpUserTimeout is TCP_USER_TIMEOUT of tcp(7), which package syscall does not
// have on every architecture.
const tcpUserTimeout = 0x12

// setUnacknowledgedTimeout limits how long data may stay unacknowledged before
// the kernel gives the connection up.
func setUnacknowledgedTimeout(raw syscall.RawConn, timeout time.Duration) error {
	var optErr error
	err := raw.Control(func(fd uintptr) {
		optErr = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, int(timeout.Milliseconds()))
	})
	if err != nil {
		return err
	}
	return optErr
}
