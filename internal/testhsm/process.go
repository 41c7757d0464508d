package testhsm

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// readyTimeout is how long a process may take to do what a signal or a start
// asked of it. It only bounds the wait for a failure.
const readyTimeout = 20 * time.Second

// group is a running program and whatever it forks: one process group, because
// p11-kit and socat serve each connection in a child of its own, and a signal to
// the parent alone would leave those at work.
type group struct {
	pid  int
	log  string        // path of what it wrote to its standard output and error
	done chan struct{} // closed when the leader has ended and is reaped
	gone bool          // killed: its number may belong to others by now
}

// startGroup starts a program as the leader of a new process group. On Linux it
// dies with this process, also when that is killed.
func startGroup(tb testing.TB, env []string, argv ...string) *group {
	tb.Helper()
	g := &group{log: filepath.Join(tempDir(tb), "log"), done: make(chan struct{})}
	// A file and no pipe: the children inherit it, and must not delay Wait.
	log, err := os.OpenFile(g.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		tb.Fatalf("testhsm: %v", err)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = env
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	dieWithParent(cmd.SysProcAttr)

	started := make(chan error, 1)
	go func() {
		defer close(g.done)
		// Linux counts the thread that started the child as its parent, so this
		// goroutine keeps it until the child has ended.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		_ = log.Close()
		started <- err
		if err == nil {
			// How it ended does not matter: it is usually killed.
			_ = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		tb.Fatalf("testhsm: %v", err)
	}
	g.pid = cmd.Process.Pid
	return g
}

// ended reports whether the leader has ended.
func (g *group) ended() bool {
	select {
	case <-g.done:
		return true
	default:
		return false
	}
}

// signal sends a signal to every process of the group and waits until each is
// in a state that settled accepts.
func (g *group) signal(sig syscall.Signal, settled func(state byte) bool) error {
	if g.gone {
		return fmt.Errorf("testhsm: %v to a server that was killed", sig)
	}
	if err := syscall.Kill(-g.pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("testhsm: %v to process group %d: %w", sig, g.pid, err)
	}
	return eventually(func() error {
		for pid, state := range g.members() {
			if !settled(state) {
				return fmt.Errorf("process %d is in state %c after %v", pid, state, sig)
			}
		}
		return nil
	})
}

// kill ends every process of the group and returns when they are gone.
func (g *group) kill() error {
	if g.gone {
		return nil
	}
	if err := g.signal(syscall.SIGKILL, dead); err != nil {
		return err
	}
	<-g.done
	g.gone = true
	return nil
}

func dead(state byte) bool    { return state == 'Z' || state == 'X' }
func stopped(state byte) bool { return state == 'T' || dead(state) }
func running(state byte) bool { return state != 'T' }

// members returns the state of each process of the group, as in proc(5). Where
// there is no /proc it is empty, and signals are not waited for.
func (g *group) members() map[int]byte {
	states := make(map[int]byte)
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		content, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended since
		}
		// pid (command) state ppid pgrp …; the command may contain anything.
		end := bytes.LastIndexByte(content, ')')
		fields := bytes.Fields(content[end+1:])
		if end < 0 || len(fields) < 3 || string(fields[2]) != strconv.Itoa(g.pid) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil {
			states[pid] = fields[0][0]
		}
	}
	return states
}

// eventually polls until check succeeds, and returns its last error when it does
// not within readyTimeout.
func eventually(check func() error) error {
	deadline := time.Now().Add(readyTimeout)
	for {
		err := check()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}
