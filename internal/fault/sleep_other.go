//go:build !linux

package fault

import "time"

func sleep(d time.Duration) { time.Sleep(d) }
