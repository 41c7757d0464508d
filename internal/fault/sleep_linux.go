package fault

import (
	"errors"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// sleep blocks the thread, as a library does that waits for its device, and to the
// microsecond: by default a thread wakes up to 50 µs late, and Go's timers come
// later still.
func sleep(d time.Duration) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
	rest := unix.NsecToTimespec(int64(d))
	for errors.Is(unix.Nanosleep(&rest, &rest), unix.EINTR) {
	}
}
