package testhsm

import "syscall"

// dieWithParent makes the kernel kill a child when this process ends, so that a
// test that panics or times out leaves no server behind.
func dieWithParent(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGKILL }
