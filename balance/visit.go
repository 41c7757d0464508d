package balance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// visit is an attempt to open a session on a member, made in the background for
// all who want one: the first one, one more, or the one that shows whether the
// HSM answers again after a suspension. There is one at a time, because HSMs do
// not like to be logged in to many times at once, and nobody has to wait for it
// who can turn to another HSM.
type visit struct {
	done chan struct{}
	err  error // valid once done is closed
}

// visit begins a visit, or joins the one that goes on.
func (m *member) visit() *visit {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.visiting == nil {
		return m.beginVisit(m.examine)
	}
	return m.visiting
}

// more begins a visit that opens one more session, or, for those who need no login
// and open theirs themselves, one more connection. It is nil where there may be no
// more, or one is being opened.
func (m *member) more(open bool) *visit {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.visiting != nil:
		return nil
	case open && m.room():
		return m.beginVisit(m.reach)
	case !open && (m.room() || slices.ContainsFunc(m.ways(), (*connection).room)):
		return m.beginVisit(m.examine)
	}
	return nil
}

// visited reports whether a visit goes on.
func (m *member) visited() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.visiting != nil
}

// room reports whether there may be one more connection. The caller holds mu.
func (m *member) room() bool {
	return len(m.ways()) < m.most && !time.Now().Before(m.full)
}

// beginVisit begins a visit that does what is asked. The caller holds mu.
func (m *member) beginVisit(do func() error) *visit {
	v := &visit{done: make(chan struct{})}
	started := m.listed && m.balancer.tasks.start(func() {
		suspended := m.suspended.Load() != nil
		v.err = do()
		m.mu.Lock()
		m.visiting = nil
		m.mu.Unlock()
		close(v.done)
		m.balancer.forget(m)
		if !busy(v.err) || suspended {
			m.balancer.changed.tell()
		}
	})
	if !started {
		v.err = errRetired
		close(v.done)
		return v
	}
	m.visiting = v
	return v
}

var errRetired = fmt.Errorf("%w: no balance list names the HSM any more", sessionpool.ErrClosed)

// examine looks whether the member answers, and takes note of that.
func (m *member) examine() error {
	was := m.suspended.Load()
	err := m.twice(func() error { return m.look(was != nil) })
	switch {
	case err == nil:
		m.resume(was)
	case busy(err):
		m.postpone(was)
	case errors.Is(err, sessionpool.ErrClosed):
	default:
		m.suspend(was, err)
	}
	return err
}

// reach connects to the member, without a login. That it works does not end a
// suspension: the login may be what does not.
func (m *member) reach() error {
	was, others := m.suspended.Load(), len(m.ways()) > 0
	err := m.twice(func() error { return m.widen(false) })
	switch {
	case err == nil, errors.Is(err, sessionpool.ErrClosed):
	case others:
		return m.enough(err)
	default:
		m.suspend(was, err)
	}
	return err
}

// twice does something once more where what it failed with may be over already.
func (m *member) twice(do func() error) error {
	began := time.Now()
	err := do()
	if passing(err) && time.Since(began) < m.balancer.settings.opTimeout()/4 {
		err = do()
	}
	return err
}

// waitFor waits for a visit, as long as one PKCS#11 call may take.
func (m *member) waitFor(ctx context.Context, v *visit) error {
	timeout := m.balancer.settings.opTimeout()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-v.done:
		return v.err
	case <-ctx.Done():
		return ended(ctx, "waiting for "+m.name)
	case <-timer.C:
		err := fmt.Errorf("%w: %s: no session could be opened within %v", sessionpool.ErrTimeout, m.name, timeout)
		m.suspend(nil, err)
		return err
	}
}

// maxAbandoned limits the private instances of one HSM's library that were
// abandoned with calls that hang.
const maxAbandoned = 4

// look opens a session and leaves it in the cache: on a connection that is there,
// or on a new one. After a suspension it opens one that is fresh, since what the
// cache holds proves nothing.
func (m *member) look(suspended bool) error {
	for _, c := range m.ways() {
		if suspended && c.hangs() && m.mayAbandon() {
			m.abandon(c)
			continue
		}
		var err error
		if suspended {
			err = c.look(sessionpool.Bypass())
		}
		if err == nil {
			err = c.look()
		}
		if !busy(err) && (!tooMany(err) || len(m.ways()) == 1) {
			return err
		}
	}
	m.mu.Lock()
	room := m.room()
	m.mu.Unlock()
	if !room {
		return errBusy
	}
	others := len(m.ways()) > 0 // a connection that fails is kept where it is the first
	err := m.widen(true)
	if err != nil && !suspended && others {
		return m.enough(err)
	}
	return err
}

// widen adds a connection, with a session or without.
func (m *member) widen(session bool) error {
	c, err := m.connect()
	if err != nil {
		return err
	}
	if session {
		err = c.look()
	}
	switch {
	case err != nil && len(m.ways()) > 0: // they are enough
	case !m.add(c):
		err = errRetired
	default:
		return err
	}
	m.mu.Lock()
	m.draining[c] = false
	m.mu.Unlock()
	_ = m.drain(c) // it was never used
	return err
}

// enough takes note that there can be no further connection, for reasons that may
// be the HSM's limits: those that there are go on. If it is down, they notice.
func (m *member) enough(cause error) error {
	if busy(cause) || errors.Is(cause, sessionpool.ErrClosed) {
		return cause
	}
	m.mu.Lock()
	m.full = time.Now().Add(m.balancer.settings.Suspend)
	m.mu.Unlock()
	m.last.Store(&suspension{cause: cause})
	return errBusy
}

// mayAbandon reports whether few enough instances hang for one more.
func (m *member) mayAbandon() bool {
	hang := 0
	for _, c := range m.outOfService() {
		if c.hangs() {
			hang++
		}
	}
	return hang < maxAbandoned
}
