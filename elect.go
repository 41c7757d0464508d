package hsmkey

import (
	"context"
	"errors"
	"fmt"

	"github.com/hsmkey/hsmkey/balance"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// voters is a source of sessions of many HSMs that are to hold the same keys: a
// [balance.Balancer], and what wraps one.
type voters interface {
	sessionpool.Source
	Members() []balance.Member
}

// elect asks every HSM of the current balance list that is not suspended which
// key the query matches, all at once, and returns the one that most of them have,
// as soon as that is certain; of equals the one of the HSM that stands first. A
// single HSM that was given another key by mistake, or was restored from an old
// backup, must not decide for a whole process what its tokens are signed with.
//
// Without key and error no HSM has said anything, or there is but one to ask.
func elect(ctx context.Context, f voters, query Query) (*material, error) {
	var members []balance.Member
	for _, m := range f.Members() {
		if m.Current && m.State() == balance.Up {
			members = append(members, m)
		}
	}
	if len(members) < 2 {
		return nil, nil
	}
	type vote struct {
		voter int
		key   *material
	}
	votes := make(chan vote, len(members))
	// Those who come too late end in their own time, and release their session.
	late := context.WithoutCancel(ctx)
	for i, m := range members {
		go func() {
			key, _ := lookUp(late, m, query) // who does not have it, does not vote
			votes <- vote{i, key}
		}()
	}
	type candidate struct {
		key   *material
		votes int
		first int // voter
	}
	candidates := map[any]*candidate{}
	var best *candidate
	for range members {
		var v vote
		select {
		case v = <-votes:
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return nil, fmt.Errorf("%w: looking for the key with %s: %w", ErrTimeout, query, ctx.Err())
			}
			return nil, fmt.Errorf("looking for the key with %s: %w", query, context.Cause(ctx))
		}
		if v.key == nil {
			continue
		}
		c := candidates[v.key.identity]
		if c == nil {
			c = &candidate{key: v.key, first: v.voter}
			candidates[v.key.identity] = c
		}
		c.votes++
		c.first = min(c.first, v.voter)
		if best == nil || c.votes > best.votes || c.votes == best.votes && c.first < best.first {
			best = c
		}
		if c.votes > len(members)/2 {
			break
		}
	}
	if best == nil {
		return nil, nil
	}
	return best.key, nil
}
