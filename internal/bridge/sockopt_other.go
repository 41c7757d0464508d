//go:build !linux

package bridge

import (
	"syscall"
	"time"
)

// setUnacknowledgedTimeout leaves the system's own limit in place.
func setUnacknowledgedTimeout(syscall.RawConn, time.Duration) error { return nil }
