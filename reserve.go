package hsmkey

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"runtime"
	"syscall"
	"time"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// makingTime is long for making a key.
const makingTime = 30 * time.Second

// reserve keeps the other processes of this machine from making keys on a token
// until release is called. That no two keys get one name is proven afterwards,
// wherever a search shows what is there. SoftHSM2's does not: a process that has
// written to the files of a token no longer notices what others wrote before.
//
// The lock is a name in Linux's abstract socket namespace, which ends with its
// process and leaves no file. Elsewhere, and when another one has it for longer than
// makingTime, the key is made without it.
func reserve(ctx context.Context, t *sessionpool.Token) (release func(), err error) {
	without := func() {}
	if runtime.GOOS != "linux" {
		return without, nil
	}
	info := t.Info()
	name := fmt.Sprintf("@hsmkey/%x", sha256.Sum256([]byte(info.Serial+"\x00"+info.Label)))
	patience := time.NewTimer(makingTime)
	defer patience.Stop()
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for {
		lock, err := net.ListenPacket("unixgram", name)
		if err == nil {
			return func() { _ = lock.Close() }, nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			return without, nil
		}
		select {
		case <-again.C:
		case <-patience.C:
			return without, nil
		case <-ctx.Done():
			return nil, ended(ctx, "waiting for another process that makes a key")
		}
	}
}
