package balance

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"time"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// fleet is what the lists of one moment amount to.
type fleet struct {
	source  Lists
	lists   []*squad
	current atomic.Int64 // the list in use
}

// squad is the members of one list.
type squad struct {
	path    string
	members []*member
	next    atomic.Uint64 // round robin
}

// members are those of all lists.
func (f *fleet) members() map[*member]bool {
	all := map[*member]bool{}
	for _, q := range f.lists {
		for _, m := range q.members {
			all[m] = true
		}
	}
	return all
}

// acquire asks the members of the current list, then those of the others, then
// whoever was spared because of a suspension. It does not wait for sessions that
// are in use: then the error is busy.
func (f *fleet) acquire(ctx context.Context, b *Balancer, a *attempt) (*sessionpool.Session, error) {
	a.busy = a.busy[:0]
	current := f.current.Load()
	for i := range int64(len(f.lists)) {
		n := (current + i) % int64(len(f.lists))
		s, err := f.lists[n].acquire(ctx, a)
		if s == nil && err == nil {
			continue // nobody of this list answers
		}
		if s != nil && i > 0 && !f.lists[current].alive() {
			f.use(b, current, n)
		}
		return s, err
	}
	return f.lastResort(ctx, b, a)
}

// use makes another list the current one.
func (f *fleet) use(b *Balancer, current, next int64) {
	if current != next && f.current.CompareAndSwap(current, next) {
		b.emit(Event{Kind: ListSwitched, List: f.lists[next].path, Err: f.lists[current].failure()})
	}
}

// acquire asks the members of one list in turn. Without session and error the
// list has nobody that answers.
func (q *squad) acquire(ctx context.Context, a *attempt) (*sessionpool.Session, error) {
	var places [MaxEndpoints]*member
	for i, m := range q.inTurn(a, places[:0]) {
		s, err := m.take(ctx, a)
		if i == 0 && busy(err) {
			s, err = m.grow(ctx, a) // whose turn it is may open one more
		}
		if a.over(ctx, m, err) {
			return s, err
		}
	}
	// None of the others has one to spare: they may open one more as well.
	busy := a.busy
	a.busy = nil
	for _, m := range busy {
		s, err := m.grow(ctx, a)
		if a.over(ctx, m, err) {
			return s, err
		}
	}
	if len(a.busy) > 0 {
		return nil, errBusy
	}
	return nil, nil
}

// inTurn appends the members that are up to order, beginning with the one whose
// turn it is. Those whose suspension has passed are looked after in the
// background.
func (q *squad) inTurn(a *attempt, order []*member) []*member {
	var up [MaxEndpoints]*member
	n := 0
	for _, m := range q.members {
		switch s := m.suspended.Load(); {
		case s == nil:
			up[n] = m
			n++
		case !time.Now().Before(s.until):
			m.visit()
		}
	}
	if n == 0 {
		return nil
	}
	first := int((q.next.Add(1) - 1) % uint64(n))
	for i := range n {
		if m := up[(first+i)%n]; !a.has(m) {
			order = append(order, m)
		}
	}
	return order
}

// alive reports whether a member of the list is not suspended.
func (q *squad) alive() bool {
	return slices.ContainsFunc(q.members, func(m *member) bool { return m.suspended.Load() == nil })
}

// reprieve is when the first suspension ends of a member of the current list whom
// nobody visits. It is zero if none is suspended.
func (f *fleet) reprieve() (first time.Time) {
	for _, m := range f.lists[f.current.Load()].members {
		if s := m.suspended.Load(); s != nil && !m.visited() && (first.IsZero() || s.until.Before(first)) {
			first = s.until
		}
	}
	return first
}

// lastResort visits everybody once more, suspended or not, all at once so that
// nobody waits for one dead HSM after the other.
func (f *fleet) lastResort(ctx context.Context, b *Balancer, a *attempt) (*sessionpool.Session, error) {
	visiting, cancel := context.WithCancel(ctx)
	defer cancel()
	type answer struct {
		member *member
		list   int
		err    error
	}
	answers := make(chan answer, len(f.lists)*MaxEndpoints)
	visits := map[*member]bool{}
	for list, q := range f.lists {
		for _, m := range q.members {
			if visits[m] || a.has(m) && !a.passing(m) {
				continue
			}
			visits[m] = true
			v := m.visit()
			go func() { answers <- answer{m, list, m.waitFor(visiting, v)} }()
		}
	}
	for range visits {
		got := <-answers
		switch {
		case got.err == nil, busy(got.err):
		case ctx.Err() != nil:
			return nil, got.err
		case errors.Is(got.err, sessionpool.ErrClosed): // the lists have changed, which is news
			a.busy = append(a.busy, got.member)
			continue
		default:
			a.failed(got.member, got.err)
			continue
		}
		s, err := got.member.take(ctx, a)
		if a.over(ctx, got.member, err) {
			if current := f.current.Load(); s != nil && !f.lists[current].alive() {
				f.use(b, current, int64(got.list))
			}
			return s, err
		}
	}
	if len(a.busy) > 0 {
		return nil, errBusy
	}
	return nil, f.failure(a)
}
