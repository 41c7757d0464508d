package main

import "sync"

// lineNumbers are those of the lines that are on their way through a batch. The batch
// counts them from 0 and knows nothing of lines that were passed over. It delivers
// them in order, so that only as many are kept as it holds.
type lineNumbers struct {
	mu     sync.Mutex
	list   []int
	passed int // how many came out
}

// add notes the number of the line that goes in.
func (l *lineNumbers) add(number int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.list = append(l.list, number)
}

// of returns the number of a line that did not come out yet.
func (l *lineNumbers) of(index int) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.list[index-l.passed]
}

// pass forgets the line that came out.
func (l *lineNumbers) pass() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.list = l.list[1:]
	l.passed++
}
