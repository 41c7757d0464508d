package fault

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/miekg/pkcs11"

	"github.com/hsmkey/hsmkey/sessionpool"
)

// module is the decorator. Modules do not survive a session that is closed
// under a call on it, so whoever meddles with sessions keeps calls out.
type module struct {
	sessionpool.Module
	injector *Injector

	calls sync.RWMutex // held for reading by calls, for writing by meddlers

	mu       sync.Mutex
	sessions map[pkcs11.SessionHandle]bool
}

// Unwrap returns the module behind.
func (m *module) Unwrap() sessionpool.Module { return m.Module }

func (m *module) handles() []pkcs11.SessionHandle {
	m.mu.Lock()
	defer m.mu.Unlock()
	var hs []pkcs11.SessionHandle
	for h := range m.sessions {
		hs = append(hs, h)
	}
	slices.Sort(hs)
	return hs
}

func (m *module) loseLogin() {
	m.calls.Lock()
	defer m.calls.Unlock()
	for _, h := range m.handles() {
		if m.Module.Logout(h) == nil {
			return
		}
	}
}

// closeSessions closes the latest n sessions, or all with a negative n.
func (m *module) closeSessions(n int) {
	m.calls.Lock()
	defer m.calls.Unlock()
	hs := m.handles()
	slices.Reverse(hs)
	for i, h := range hs {
		if i == n {
			return
		}
		_ = m.Module.CloseSession(h)
		m.closed(h)
	}
}

func (m *module) closed(h pkcs11.SessionHandle) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.sessions, h)
}

// do lets a call through to the module, unless it is to fail or to be answered
// here.
func (m *module) do(function string, call func() error) error {
	instead, err := m.injector.before(function)
	if err != nil || instead {
		return err
	}
	m.calls.RLock()
	defer m.calls.RUnlock()
	return call()
}

// on is do for a call on a session. A session that is said to be closed is
// closed: a pool does not close it again, so it would leak.
func (m *module) on(h pkcs11.SessionHandle, function string, call func() error) error {
	instead, err := m.injector.before(function)
	if err != nil {
		m.makeTrue(h, err)
		return err
	}
	if instead {
		return nil
	}
	m.calls.RLock()
	defer m.calls.RUnlock()
	return call()
}

func (m *module) makeTrue(h pkcs11.SessionHandle, err error) {
	if errors.Is(err, pkcs11.Error(pkcs11.CKR_SESSION_CLOSED)) || errors.Is(err, pkcs11.Error(pkcs11.CKR_SESSION_HANDLE_INVALID)) {
		m.calls.RLock()
		defer m.calls.RUnlock()
		if m.Module.CloseSession(h) == nil {
			m.closed(h)
		}
	}
}

func (m *module) Initialize(opts ...pkcs11.InitializeOption) error {
	return m.do("C_Initialize", func() error { return m.Module.Initialize(opts...) })
}

func (m *module) Finalize() error {
	return m.do("C_Finalize", func() error {
		err := m.Module.Finalize()
		if err == nil {
			m.mu.Lock()
			defer m.mu.Unlock()
			clear(m.sessions)
		}
		return err
	})
}

func (m *module) GetSlotList(present bool) (slots []uint, err error) {
	err = m.do("C_GetSlotList", func() error { slots, err = m.Module.GetSlotList(present); return err })
	return slots, err
}

func (m *module) GetTokenInfo(slot uint) (info pkcs11.TokenInfo, err error) {
	err = m.do("C_GetTokenInfo", func() error { info, err = m.Module.GetTokenInfo(slot); return err })
	return info, err
}

func (m *module) GetMechanismList(slot uint) (list []*pkcs11.Mechanism, err error) {
	err = m.do("C_GetMechanismList", func() error { list, err = m.Module.GetMechanismList(slot); return err })
	return list, err
}

func (m *module) OpenSession(slot, flags uint) (h pkcs11.SessionHandle, err error) {
	err = m.do("C_OpenSession", func() error {
		h, err = m.Module.OpenSession(slot, flags)
		if err == nil {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.sessions[h] = true
		}
		return err
	})
	return h, err
}

func (m *module) CloseSession(h pkcs11.SessionHandle) error {
	return m.on(h, "C_CloseSession", func() error {
		err := m.Module.CloseSession(h)
		if err == nil {
			m.closed(h)
		}
		return err
	})
}

func (m *module) GetSessionInfo(h pkcs11.SessionHandle) (info pkcs11.SessionInfo, err error) {
	err = m.on(h, "C_GetSessionInfo", func() error { info, err = m.Module.GetSessionInfo(h); return err })
	return info, err
}

func (m *module) Login(h pkcs11.SessionHandle, userType uint, pin string) error {
	return m.on(h, "C_Login", func() error { return m.Module.Login(h, userType, pin) })
}

func (m *module) Logout(h pkcs11.SessionHandle) error {
	return m.on(h, "C_Logout", func() error { return m.Module.Logout(h) })
}

func (m *module) FindObjectsInit(h pkcs11.SessionHandle, template []*pkcs11.Attribute) error {
	return m.on(h, "C_FindObjectsInit", func() error { return m.Module.FindObjectsInit(h, template) })
}

func (m *module) FindObjects(h pkcs11.SessionHandle, limit int) (found []pkcs11.ObjectHandle, more bool, err error) {
	err = m.on(h, "C_FindObjects", func() error { found, more, err = m.Module.FindObjects(h, limit); return err })
	return found, more, err
}

func (m *module) FindObjectsFinal(h pkcs11.SessionHandle) error {
	return m.on(h, "C_FindObjectsFinal", func() error { return m.Module.FindObjectsFinal(h) })
}

func (m *module) GetAttributeValue(h pkcs11.SessionHandle, o pkcs11.ObjectHandle, a []*pkcs11.Attribute) (values []*pkcs11.Attribute, err error) {
	err = m.on(h, "C_GetAttributeValue", func() error { values, err = m.Module.GetAttributeValue(h, o, a); return err })
	return values, err
}

func (m *module) CreateObject(h pkcs11.SessionHandle, template []*pkcs11.Attribute) (o pkcs11.ObjectHandle, err error) {
	err = m.on(h, "C_CreateObject", func() error { o, err = m.Module.CreateObject(h, template); return err })
	return o, err
}

func (m *module) DestroyObject(h pkcs11.SessionHandle, o pkcs11.ObjectHandle) error {
	return m.on(h, "C_DestroyObject", func() error { return m.Module.DestroyObject(h, o) })
}

func (m *module) GenerateKey(h pkcs11.SessionHandle, mech []*pkcs11.Mechanism, template []*pkcs11.Attribute) (o pkcs11.ObjectHandle, err error) {
	err = m.on(h, "C_GenerateKey", func() error { o, err = m.Module.GenerateKey(h, mech, template); return err })
	return o, err
}

func (m *module) GenerateKeyPair(h pkcs11.SessionHandle, mech []*pkcs11.Mechanism, public, private []*pkcs11.Attribute) (pub, priv pkcs11.ObjectHandle, err error) {
	err = m.on(h, "C_GenerateKeyPair", func() error {
		pub, priv, err = m.Module.GenerateKeyPair(h, mech, public, private)
		return err
	})
	return pub, priv, err
}

func (m *module) SignInit(h pkcs11.SessionHandle, mech []*pkcs11.Mechanism, key pkcs11.ObjectHandle) error {
	return m.on(h, "C_SignInit", func() error { return m.Module.SignInit(h, mech, key) })
}

func (m *module) Sign(h pkcs11.SessionHandle, data []byte) (sig []byte, err error) {
	err = m.on(h, "C_Sign", func() error { sig, err = m.Module.Sign(h, data); return err })
	return sig, err
}

// SignSingle is C_SignInit and C_Sign, and either may fail.
func (m *module) SignSingle(dst []byte, h pkcs11.SessionHandle, mech *pkcs11.Mechanism, key pkcs11.ObjectHandle, data []byte, size int) ([]byte, error) {
	_, err := m.injector.before("C_SignInit")
	instead := false
	if err == nil {
		instead, err = m.injector.before("C_Sign")
	}
	if err != nil {
		m.makeTrue(h, err)
		return nil, err
	}
	if instead {
		return append(dst, make([]byte, size)...), nil
	}
	m.calls.RLock()
	defer m.calls.RUnlock()
	return m.Module.SignSingle(dst, h, mech, key, data, size)
}

func (m *module) SignLots(ctx context.Context, h pkcs11.SessionHandle, mech *pkcs11.Mechanism, key pkcs11.ObjectHandle, size int, next func() *sessionpool.Lot, done func(*sessionpool.Lot)) error {
	return sessionpool.SignEach(ctx, m, h, mech, key, size, next, done)
}

func (m *module) DecryptInit(h pkcs11.SessionHandle, mech []*pkcs11.Mechanism, key pkcs11.ObjectHandle) error {
	return m.on(h, "C_DecryptInit", func() error { return m.Module.DecryptInit(h, mech, key) })
}

func (m *module) Decrypt(h pkcs11.SessionHandle, ciphertext []byte) (plain []byte, err error) {
	err = m.on(h, "C_Decrypt", func() error { plain, err = m.Module.Decrypt(h, ciphertext); return err })
	return plain, err
}
