// Package fault stands in front of a real PKCS#11 module and makes its calls
// fail, wait, hang or lose their session, as real modules do.
//
// An [Injector] is driven by rules of a test ("the second C_Sign answers
// CKR_DEVICE_ERROR") or by a seed: then whether the nth call of a function fails,
// and how, depends on nothing but the seed, so that a failure found by a random
// test can be replayed.
package fault

import (
	"math/rand/v2"
	"sync"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// Injector decides what happens to the calls of the modules it wraps. It is safe
// for concurrent use; rules may be set at any time.
type Injector struct {
	mu     sync.Mutex
	calls  map[string]int
	fail   map[string]map[int]error // by number of the call
	always map[string]error
	delay  map[string]time.Duration
	hang   map[string]*hang
	answer map[string]bool
	random *random
	module *module // the one wrapped last
}

type hang struct {
	reached chan struct{}
	release chan struct{}
	once    sync.Once
}

type random struct {
	seed  uint64
	rate  float64
	codes map[string][]uint
}

// New returns an injector without rules.
func New() *Injector {
	return &Injector{
		calls: map[string]int{}, fail: map[string]map[int]error{}, always: map[string]error{},
		delay: map[string]time.Duration{}, hang: map[string]*hang{}, answer: map[string]bool{},
	}
}

// Wrap puts the injector in front of a module; it is a sessionpool.Config.Wrap.
func (i *Injector) Wrap(inner sessionpool.Module) sessionpool.Module {
	m := &module{Module: inner, injector: i, sessions: map[pkcs11.SessionHandle]bool{}}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.module = m
	return m
}

// Calls is how often a function ("C_Sign") was called, with or without success.
func (i *Injector) Calls(function string) int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.calls[function]
}

// Fail makes the nth call of a function from now on (1 is the next) answer code.
func (i *Injector) Fail(function string, nth int, code uint) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.fail[function] == nil {
		i.fail[function] = map[int]error{}
	}
	i.fail[function][i.calls[function]+nth] = pkcs11.Error(code)
}

// FailAll makes every call of a function answer code, until Clear.
func (i *Injector) FailAll(function string, code uint) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.always[function] = pkcs11.Error(code)
}

// Delay makes every call of a function take d longer.
func (i *Injector) Delay(function string, d time.Duration) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.delay[function] = d
}

// Answer makes every call of a function succeed at once, without reaching the
// module: C_Sign yields zeros. It is for measuring what is not the module's.
func (i *Injector) Answer(function string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.answer[function] = true
}

// Hang makes the next call of a function wait for release, however long its
// caller waits. reached is closed when it does.
func (i *Injector) Hang(function string) (reached <-chan struct{}, release func()) {
	h := &hang{reached: make(chan struct{}), release: make(chan struct{})}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.hang[function] = h
	return h.reached, func() { h.once.Do(func() { close(h.release) }) }
}

// Random makes calls fail at a rate from 0 to 1 with one of the codes given for
// their function.
func (i *Injector) Random(seed uint64, rate float64, codes map[string][]uint) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.random = &random{seed: seed, rate: rate, codes: codes}
}

// Clear removes every rule. Calls that hang go on hanging.
func (i *Injector) Clear() {
	i.mu.Lock()
	defer i.mu.Unlock()
	clear(i.fail)
	clear(i.always)
	clear(i.delay)
	clear(i.hang)
	clear(i.answer)
	i.random = nil
}

// LoseLogin logs the user out behind the pool's back.
func (i *Injector) LoseLogin() { i.current().loseLogin() }

// CloseSessions closes every session behind the pool's back; CloseSession
// closes one of them.
func (i *Injector) CloseSessions() { i.current().closeSessions(-1) }

// CloseSession closes one session behind the pool's back: the latest opened.
func (i *Injector) CloseSession() { i.current().closeSessions(1) }

// Sessions is the number of sessions that are open in the module.
func (i *Injector) Sessions() int {
	m := i.current()
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.sessions)
}

func (i *Injector) current() *module {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.module
}

// before is what a call goes through before it may reach the module. instead
// says that it must not.
func (i *Injector) before(function string) (instead bool, err error) {
	i.mu.Lock()
	i.calls[function]++
	n := i.calls[function]
	d, h, instead := i.delay[function], i.hang[function], i.answer[function]
	delete(i.hang, function)
	err = i.always[function]
	if e := i.fail[function][n]; e != nil {
		delete(i.fail[function], n)
		err = e
	}
	if err == nil && i.random != nil {
		err = i.random.draw(function, n)
	}
	i.mu.Unlock()
	if h != nil {
		close(h.reached)
		<-h.release
	}
	if d > 0 {
		sleep(d)
	}
	return instead, err
}

// draw decides the fate of the nth call of a function.
func (r *random) draw(function string, n int) error {
	codes := r.codes[function]
	if len(codes) == 0 {
		return nil
	}
	rng := rand.New(rand.NewPCG(r.seed^fingerprint(function), uint64(n))) //nolint:gosec // to be replayed, not secret
	if rng.Float64() >= r.rate {
		return nil
	}
	return pkcs11.Error(codes[rng.IntN(len(codes))])
}

// fingerprint is FNV-1a: it must be the same in every process.
func fingerprint(s string) uint64 {
	h := uint64(14695981039346656037)
	for _, b := range []byte(s) {
		h = (h ^ uint64(b)) * 1099511628211
	}
	return h
}
