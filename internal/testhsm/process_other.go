//go:build !linux

package testhsm

import "syscall"

// dieWithParent has no counterpart here: servers end with tb.Cleanup only.
func dieWithParent(*syscall.SysProcAttr) {}
