package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/hsmkey/hsmkey"
)

// signer is one way to sign. sign signs in so many sessions until the time is
// over and returns how many tokens, or signatures, it made.
type signer interface {
	sign(alg hsmkey.Algorithm, key string, sessions int, until time.Time) (int64, error)
}

// serveCommands is the peer's side of process.measure; internal/bareloop is the
// same in C.
func serveCommands(name string) error {
	s, err := newSigner(name, os.Getenv("HSM_MODULE"), os.Getenv("HSM_TOKEN"))
	if err != nil {
		return err
	}
	fmt.Println("ready")
	commands := bufio.NewScanner(os.Stdin)
	for commands.Scan() {
		var (
			alg                 hsmkey.Algorithm
			key                 string
			sessions, ms, bytes int
		)
		if _, err := fmt.Sscan(commands.Text(), &alg, &key, &sessions, &ms, &bytes); err != nil {
			return err
		}
		start, busy := time.Now(), cpuTime()
		count, err := s.sign(alg, key, sessions, start.Add(time.Duration(ms)*time.Millisecond))
		switch {
		case errors.Is(err, errCannot):
			fmt.Println(err)
		case err != nil:
			return err
		default:
			fmt.Println(count, time.Since(start).Nanoseconds(), (cpuTime() - busy).Nanoseconds())
		}
	}
	return commands.Err()
}

// cpuTime is the processor time of this process so far.
func cpuTime() time.Duration {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return 0
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// loop runs each function in a goroutine until the time is over and counts.
func loop(until time.Time, workers []func() error) (int64, error) {
	var group sync.WaitGroup
	counts, errs := make([]int64, len(workers)), make([]error, len(workers))
	for i, work := range workers {
		group.Go(func() {
			n := int64(0)
			for time.Now().Before(until) && errs[i] == nil {
				errs[i] = work()
				n++
			}
			counts[i] = n
		})
	}
	group.Wait()
	total := int64(0)
	for _, n := range counts {
		total += n
	}
	return total, errors.Join(errs...)
}

// repeat is loop for workers that are all the same.
func repeat(until time.Time, workers int, work func() error) (int64, error) {
	all := make([]func() error, workers)
	for i := range all {
		all[i] = work
	}
	return loop(until, all)
}
