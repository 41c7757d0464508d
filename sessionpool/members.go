package sessionpool

import (
	"sync"
	"time"
)

// members are the pools on a token. Where they disagree the strictest holds:
// each limit says what the token, or the person who runs it, can bear.
type members struct {
	mu    sync.Mutex
	pools map[*Pool]struct{}
}

func (m *members) add(p *Pool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pools == nil {
		m.pools = map[*Pool]struct{}{}
	}
	m.pools[p] = struct{}{}
}

// leave reports whether p is the last member, who stays to be told of the end.
func (m *members) leave(p *Pool) (last bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.pools) == 1 {
		return true
	}
	delete(m.pools, p)
	return false
}

func (m *members) remove(p *Pool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.pools, p)
}

// limits are what the members agree on.
type limits struct {
	sessions, orphans int
	idle, op          time.Duration
}

func (m *members) limits(info TokenInfo) limits {
	m.mu.Lock()
	defer m.mu.Unlock()
	l := limits{orphans: maxSessionsBound, idle: maxDuration, op: maxDuration}
	for p := range m.pools {
		if n := p.cfg.MaxSessions; n > 0 && (l.sessions == 0 || n < l.sessions) {
			l.sessions = n
		}
		l.orphans = min(l.orphans, p.cfg.MaxOrphans)
		l.idle = min(l.idle, p.cfg.IdleTimeout)
		l.op = min(l.op, p.cfg.OpTimeout)
	}
	// The anchor of the login takes one of what the token allows.
	most := int(min(info.MaxSessions, maxSessionsBound))
	if most > 1 {
		most--
	}
	switch {
	case l.sessions == 0 && most == 0:
		l.sessions = DefaultMaxSessions
	case l.sessions == 0 || most > 0 && most < l.sessions:
		l.sessions = most
	}
	return l
}

// emit tells every member what happened.
func (m *members) emit(e Event) {
	m.mu.Lock()
	hooks := make([]func(Event), 0, len(m.pools))
	for p := range m.pools {
		if p.cfg.OnEvent != nil {
			hooks = append(hooks, p.cfg.OnEvent)
		}
	}
	m.mu.Unlock()
	for _, hook := range hooks {
		hook(e)
	}
}

// emit adds the token's name to an event and tells the pools.
func (t *Token) emit(e Event) {
	e.Token = t.name
	t.members.emit(e)
}

// applyLimits makes the cache keep to what the members agree on. What is idle
// beyond that is closed in the background.
func (t *Token) applyLimits(p *Pool) {
	for _, excess := range t.cache.setLimits(t.members.limits(t.Info())) {
		t.later(p, func() { t.discard(excess, CloseLimit) })
	}
	t.sweeper.schedule(t)
}
