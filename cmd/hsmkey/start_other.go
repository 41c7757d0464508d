//go:build !linux

package main

// scatter is for what Linux lets us do before the Go runtime starts.
func scatter() {}
