package sessionpool

import "context"

// Source hands out sessions. [*Pool] is the Source of one token; a balancer
// over several is another. Implementations are safe for concurrent use.
type Source interface {
	// Acquire waits for a session until ctx ends. The caller owns the session
	// until it calls Release or Close.
	Acquire(ctx context.Context, opts ...Option) (*Session, error)
}

// Option says what kind of session is wanted. Without options a session is
// read-only and comes from the cache if it can.
type Option struct {
	set    optionSet
	pin    string
	once   bool
	avoid  *Token
	giveUp <-chan struct{}
}

type optionSet uint8

const (
	optReadWrite optionSet = 1 << iota
	optBypass
	optEncrypted
	optPublic
	optIdle
)

// ReadWrite asks for a session that may change the token (CKF_RW_SESSION).
func ReadWrite() Option { return Option{set: optReadWrite} }

// Bypass asks for a fresh physical session that never enters the cache (the
// seed's CACHE_BYPASS).
func Bypass() Option { return Option{set: optBypass} }

// Public asks for a session that needs no login, even if the pool has a PIN: for
// what a token tells everybody.
func Public() Option { return Option{set: optPublic} }

// Encrypted asks for a session whose way to the HSM is encrypted or inside this
// process. A pool that cannot give one answers [ErrUnsupported] and
// [ErrUnsuitable].
func Encrypted() Option { return Option{set: optEncrypted} }

// OneTimePIN asks for a session with a login of its own, by a PIN that is good
// once (a second factor). It is never cached, and ends with its Release. A
// login belongs to the application and token, so the session gets a private
// instance of the module; where the module cannot be loaded twice the answer is
// ErrUnsupported, and the shared login is not touched.
func OneTimePIN(pin string) Option { return Option{pin: pin, once: true} }

// OneTime reports whether the option is a [OneTimePIN], which a source of many
// tokens must not send to more than one of them.
func (o Option) OneTime() bool { return o.once }

// NoLogin reports whether the option is [Public]: a source must not log in to
// meet it.
func (o Option) NoLogin() bool { return o.set&optPublic != 0 }

// Usual reports whether usual sessions meet the option: those that a source hands
// out without options, read-only and from the cache.
func (o Option) Usual() bool { return !o.once && o.set&(optReadWrite|optBypass|optPublic) == 0 }

// Idle asks for a session from the cache: a pool opens none. It answers
// [ErrUnsuitable] if the cache has none, or with WaitUntil waits for one that
// others release.
func Idle() Option { return Option{set: optIdle} }

// NoWait asks for a session without waiting for others to release theirs: at its
// limit a pool answers [ErrUnsuitable].
func NoWait() Option { return noWait }

// WaitUntil is NoWait from when stop is closed on. It ends the wait for a session
// that others have, never one that is being opened.
func WaitUntil(stop <-chan struct{}) Option { return Option{giveUp: stop} }

var noWait = func() Option {
	never := make(chan struct{})
	close(never)
	return WaitUntil(never)
}()

// Avoid asks for a session that is not on the HSM of a token. A pool, which has
// one HSM only, answers [ErrSession] and [ErrUnsuitable] if it is that one.
func Avoid(t *Token) Option { return Option{avoid: t} }

// request is what a caller's options amount to.
type request struct {
	set    optionSet
	pin    string
	once   bool
	avoid  []*Token
	giveUp <-chan struct{}
}

func newRequest(opts []Option) request {
	var r request
	for _, o := range opts {
		r.set |= o.set
		if o.once {
			r.pin, r.once = o.pin, true
		}
		if o.avoid != nil {
			r.avoid = append(r.avoid, o.avoid)
		}
		if o.giveUp != nil {
			r.giveUp = o.giveUp
		}
	}
	if r.has(optIdle) && r.giveUp == nil {
		r.giveUp = noWait.giveUp
	}
	return r
}

func (r request) has(o optionSet) bool { return r.set&o != 0 }

// kind is what a cached session must have in common with the one asked for.
// Whether it is encrypted is a property of the whole pool.
type kind uint8

const (
	kindReadWrite kind = 1 << iota
	kindPublic
	kinds = 4
)

func (k kind) readWrite() bool { return k&kindReadWrite != 0 }
func (k kind) public() bool    { return k&kindPublic != 0 }
