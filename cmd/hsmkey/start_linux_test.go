package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The Go runtime's own threads stay on one processor in a process that signs once with
// SoftHSM2. Its main thread does not, nor does any thread of another process.
func TestOnlyARuntimeThatServesOneSignatureKeepsToOneProcessor(t *testing.T) {
	if slack, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0); err != nil || slack >= 10e6 {
		t.Fatalf("the test itself was gathered: timer slack %d ns, %v", slack, err)
	}
	filter, err := unix.PrctlRetInt(unix.PR_GET_SECCOMP, 0, 0, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	all := processors(t, os.Getpid())
	dir, pin := newToken(t)
	t.Setenv("HSM_PIN", pin)
	shell(t, dir, "hsmkey key generate key --type ec:P-256")
	for _, c := range []struct {
		command, env string
		together     bool
	}{
		{"hsmkey sign --key key", "", filter == 0},
		{"hsmkey sign --key key --module libsofthsm2.so", "", filter == 0},
		{"hsmkey sign --key key --module=other.so", "", false},
		{"hsmkey sign --key key", "HSM_MODULE=/usr/lib/other.so", false},
		{"hsmkey sign --key key --balance-list none", "", false},
		{"hsmkey sign --key key --balance-list=none", "", false},
		{"hsmkey sign --key key", "HSM_LOAD_BALANCE_LIST=none", false},
		{"hsmkey sign --key key --uri pkcs11:token=none", "", false},
		{"hsmkey batch --key key", "", false},
		{"filtered hsmkey sign --key key", "", false},
	} {
		t.Run(c.command+" "+c.env, func(t *testing.T) {
			args := strings.Fields(c.command)
			cmd := exec.Command(args[0], args[1:]...)
			cmd.Dir = dir
			cmd.Env = append(cmd.Environ(), c.env)
			stdin, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			// More than fits into a pipe: when it is written, the program reads.
			if _, err := io.WriteString(stdin, strings.Repeat(" ", 1<<17)); err != nil {
				t.Errorf("writing claims: %v", err)
			}
			pid := cmd.Process.Pid
			if n := processors(t, pid); n != all {
				t.Errorf("main may run on %d processors, want %d", n, all)
			}
			together := false
			threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
			if err != nil {
				t.Fatal(err)
			}
			for _, thread := range threads {
				id, err := strconv.Atoi(thread.Name())
				if err != nil {
					t.Fatal(err)
				}
				together = together || processors(t, id) == 1
			}
			if together != (c.together || all == 1) {
				t.Errorf("some threads keep to one processor: %v, want %v", together, c.together)
			}
			_ = stdin.Close()
			_ = cmd.Wait() // there were no claims
		})
	}
}

// processors counts those that a thread may run on.
func processors(t *testing.T, thread int) int {
	t.Helper()
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(thread, &set); err != nil {
		t.Fatal(err)
	}
	return set.Count()
}

func init() { programs["filtered"] = filtered }

// filtered runs a program as a service that may not choose its processors: one that
// tries is killed, as under systemd's SystemCallFilter=~@resources.
func filtered() {
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // seccomp_data.nr
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_SCHED_SETAFFINITY, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_KILL_PROCESS},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	path, err := exec.LookPath(os.Args[1])
	if err == nil {
		err = unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	}
	if err == nil {
		const everyThread = unix.SECCOMP_FILTER_FLAG_TSYNC
		_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, everyThread, uintptr(unsafe.Pointer(&program)))
		if errno == 0 {
			err = syscall.Exec(path, os.Args[1:], os.Environ())
		} else {
			err = errno
		}
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}
