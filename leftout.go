package hsmkey

import (
	"sync/atomic"
	"time"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// leftOutFor is how long an HSM is left out that does not have a key, has another
// one under its name, or lacks the mechanism, before it is asked again: somebody
// may have put it right.
const leftOutFor = time.Minute

// leftOut remembers which HSMs cannot be used with one key, so that not every
// signature whose turn it is there has to find that out and go elsewhere. The
// zero value is ready; it is safe for concurrent use.
type leftOut struct {
	// The map is never written to, but replaced.
	hsms atomic.Pointer[map[lack]lacking]
}

// lack is an HSM and the scheme that it cannot sign by; the zero schemeID stands
// for all of them.
type lack struct {
	hsm    string
	scheme schemeID
}

type lacking struct {
	token *sessionpool.Token
	until time.Time
}

// note leaves out the HSM of a session. Of two notes at once one may be lost, and
// is made again.
func (l *leftOut) note(s *sessionpool.Session, scheme schemeID) {
	t, now := s.Token(), time.Now()
	known := l.hsms.Load()
	next := map[lack]lacking{{t.Name(), scheme}: {t, now.Add(leftOutFor)}}
	if known != nil {
		for k, v := range *known {
			if _, fresh := next[k]; !fresh && now.Before(v.until) {
				next[k] = v
			}
		}
	}
	l.hsms.CompareAndSwap(known, &next)
}

// avoid returns what keeps a signature by a scheme away from the HSMs that are
// left out.
func (l *leftOut) avoid(scheme schemeID) (opts []sessionpool.Option) {
	known := l.hsms.Load()
	if known == nil {
		return nil
	}
	now := time.Now()
	for k, v := range *known {
		if (k.scheme == scheme || k.scheme == schemeID{}) && now.Before(v.until) {
			opts = append(opts, sessionpool.Avoid(v.token))
		}
	}
	return opts
}
