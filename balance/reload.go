package balance

import (
	"sync"
	"sync/atomic"
	"time"
)

// reloader is the goroutine that reads the lists again from time to time.
type reloader struct {
	once sync.Once
	quit chan struct{}
	done chan struct{}
}

func (b *Balancer) startReloader() *reloader {
	r := &reloader{quit: make(chan struct{}), done: make(chan struct{})}
	if b.settings.Refresh == 0 {
		close(r.done)
		return r
	}
	go func() {
		defer close(r.done)
		tick := time.NewTicker(b.settings.Refresh)
		defer tick.Stop()
		for {
			select {
			case <-r.quit:
				return
			case <-tick.C:
				b.reload()
			}
		}
	}()
	return r
}

func (r *reloader) stop() {
	r.once.Do(func() { close(r.quit) })
	<-r.done
}

// reloads counts the outcomes of reading lists again.
type reloads struct {
	same, changed, invalid atomic.Uint64
}

// reload reads the lists again. It runs on the reloader's goroutine only.
func (b *Balancer) reload() {
	lists, err := LoadLists(b.settings.Lists)
	if err == nil {
		err = b.settings.accept(lists)
	}
	old := b.fleet.Load()
	switch {
	case err != nil:
		b.reloads.invalid.Add(1)
		b.emit(Event{Kind: ReloadFailed, Err: err})
	case lists.Equal(old.source):
		b.reloads.same.Add(1)
	default:
		fresh := b.muster(lists)
		b.fleet.Store(fresh)
		b.changed.tell()
		// In the background: a dead HSM keeps nobody waiting.
		for m := range old.members() {
			if fresh.members()[m] {
				m.reset()
			} else {
				m.retire()
			}
		}
		b.reloads.changed.Add(1)
		b.emit(Event{Kind: Reloaded})
	}
}
