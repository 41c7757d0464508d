package sessionpool_test

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// onTwoTokens opens a pool on each of two tokens of one library.
func onTwoTokens(t *testing.T, wrap func(sessionpool.Module) sessionpool.Module) (open func(label string) *sessionpool.Pool) {
	tok := testhsm.New(t, "a", "b")
	return func(label string) *sessionpool.Pool {
		p, err := sessionpool.New(sessionpool.Config{
			Module: tok.Module, TokenLabel: label, PIN: sessionpool.StaticPIN(testhsm.PIN), Wrap: wrap,
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { closePool(t, p) })
		return p
	}
}

func TestATokenKeepsItsPoolsWhenSlotsAreNumberedAnew(t *testing.T) {
	var module *swappedSlots
	open := onTwoTokens(t, func(m sessionpool.Module) sessionpool.Module {
		module = &swappedSlots{Module: m}
		return module
	})
	a, b := open("a"), open("b")
	acquire(t, a).Release()
	acquire(t, b).Release()
	module.slots = [2]uint{a.Token().Slot, b.Token().Slot}
	other := pkcs11.New(testhsm.ModulePath())
	if err := errors.Join(other.Finalize(), other.Initialize()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = other.Finalize() })
	module.swapped.Store(true)
	again := open("b")
	s, u, v := acquire(t, a), acquire(t, b), acquire(t, again)
	if got, want := [3]string{a.Token().Label, b.Token().Label, again.Token().Label}, [3]string{"a", "b", "b"}; got != want {
		t.Errorf("the pools are on the tokens %v, want %v", got, want)
	}
	if s.Token() == u.Token() || u.Token() != v.Token() {
		t.Error("the pools do not share their tokens as they should")
	}
	s.Release()
	u.Release()
	v.Release()
}

// swappedSlots is a library that, once swapped, numbers two slots the other way
// round.
type swappedSlots struct {
	sessionpool.Module
	slots   [2]uint
	swapped atomic.Bool
}

func (m *swappedSlots) real(slot uint) uint {
	switch {
	case !m.swapped.Load():
	case slot == m.slots[0]:
		return m.slots[1]
	case slot == m.slots[1]:
		return m.slots[0]
	}
	return slot
}

func (m *swappedSlots) GetTokenInfo(slot uint) (pkcs11.TokenInfo, error) {
	return m.Module.GetTokenInfo(m.real(slot))
}

func (m *swappedSlots) GetMechanismList(slot uint) ([]*pkcs11.Mechanism, error) {
	return m.Module.GetMechanismList(m.real(slot))
}

func (m *swappedSlots) OpenSession(slot, flags uint) (pkcs11.SessionHandle, error) {
	return m.Module.OpenSession(m.real(slot), flags)
}

func TestADeadSessionIsNotClosedUnderTheSessionThatGotItsHandle(t *testing.T) {
	var module *lowestHandles
	open := onTwoTokens(t, func(m sessionpool.Module) sessionpool.Module {
		module = &lowestHandles{Module: m, sessions: map[pkcs11.SessionHandle]pkcs11.SessionHandle{}}
		return module
	})
	a, b := open("a"), open("b")
	other := acquire(t, b) // and the login's anchor
	defer other.Release()
	dead := acquire(t, a)
	number := handle(t, dead)
	if err := module.CloseSession(number); err != nil { // behind our back
		t.Fatal(err)
	}
	s := acquire(t, b)
	defer s.Release()
	if got := handle(t, s); got != number {
		t.Fatalf("the new session has handle %d, want the free one, %d", got, number)
	}
	dead.Close()
	if err := ping(s); err != nil || b.Stats().Recoveries != 0 {
		t.Errorf("the session with the same handle was closed: %v, %+v", err, b.Stats())
	}
}

// lowestHandles is a library that gives the lowest free number to a session.
type lowestHandles struct {
	sessionpool.Module
	mu       sync.Mutex
	sessions map[pkcs11.SessionHandle]pkcs11.SessionHandle
}

func (m *lowestHandles) OpenSession(slot, flags uint) (pkcs11.SessionHandle, error) {
	h, err := m.Module.OpenSession(slot, flags)
	if err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	number := pkcs11.SessionHandle(1)
	for m.sessions[number] != 0 {
		number++
	}
	m.sessions[number] = h
	return number, nil
}

func (m *lowestHandles) behind(number pkcs11.SessionHandle) (pkcs11.SessionHandle, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if h := m.sessions[number]; h != 0 {
		return h, nil
	}
	return 0, pkcs11.Error(pkcs11.CKR_SESSION_HANDLE_INVALID)
}

// take frees a number.
func (m *lowestHandles) take(number pkcs11.SessionHandle) (pkcs11.SessionHandle, error) {
	h, err := m.behind(number)
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.sessions, number)
	return h, err
}

func (m *lowestHandles) CloseSession(number pkcs11.SessionHandle) error {
	h, err := m.take(number)
	if err != nil {
		return err
	}
	return m.Module.CloseSession(h)
}

func (m *lowestHandles) GetSessionInfo(number pkcs11.SessionHandle) (pkcs11.SessionInfo, error) {
	h, err := m.behind(number)
	if err != nil {
		return pkcs11.SessionInfo{}, err
	}
	return m.Module.GetSessionInfo(h)
}

func (m *lowestHandles) Login(number pkcs11.SessionHandle, userType uint, pin string) error {
	h, err := m.behind(number)
	if err != nil {
		return err
	}
	return m.Module.Login(h, userType, pin)
}
