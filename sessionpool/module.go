package sessionpool

import (
	"context"

	"github.com/miekg/pkcs11"
)

// Module is what the toolkit uses of a PKCS#11 library: methods of
// [pkcs11.Ctx] with their meaning unchanged, and SignSingle and SignLots. It is the
// one way to an HSM, and the place where [Config.Wrap] puts a decorator.
//
// The Module that [Session.Do] hands out is bound to that call: it refuses to
// work once the function has returned, and it refuses what would pull the rug
// from under other sessions (Initialize, Finalize, Logout).
type Module interface {
	Initialize(opts ...pkcs11.InitializeOption) error
	Finalize() error
	GetInfo() (pkcs11.Info, error)
	GetSlotList(tokenPresent bool) ([]uint, error)
	GetSlotInfo(slot uint) (pkcs11.SlotInfo, error)
	GetTokenInfo(slot uint) (pkcs11.TokenInfo, error)
	GetMechanismList(slot uint) ([]*pkcs11.Mechanism, error)
	GetMechanismInfo(slot uint, m []*pkcs11.Mechanism) (pkcs11.MechanismInfo, error)

	OpenSession(slot uint, flags uint) (pkcs11.SessionHandle, error)
	CloseSession(pkcs11.SessionHandle) error
	GetSessionInfo(pkcs11.SessionHandle) (pkcs11.SessionInfo, error)
	Login(h pkcs11.SessionHandle, userType uint, pin string) error
	Logout(pkcs11.SessionHandle) error

	FindObjectsInit(h pkcs11.SessionHandle, template []*pkcs11.Attribute) error
	FindObjects(h pkcs11.SessionHandle, limit int) ([]pkcs11.ObjectHandle, bool, error)
	FindObjectsFinal(pkcs11.SessionHandle) error
	GetAttributeValue(h pkcs11.SessionHandle, o pkcs11.ObjectHandle, a []*pkcs11.Attribute) ([]*pkcs11.Attribute, error)
	CreateObject(h pkcs11.SessionHandle, template []*pkcs11.Attribute) (pkcs11.ObjectHandle, error)
	DestroyObject(h pkcs11.SessionHandle, o pkcs11.ObjectHandle) error
	GenerateKey(h pkcs11.SessionHandle, m []*pkcs11.Mechanism, template []*pkcs11.Attribute) (pkcs11.ObjectHandle, error)
	GenerateKeyPair(h pkcs11.SessionHandle, m []*pkcs11.Mechanism, public, private []*pkcs11.Attribute) (pkcs11.ObjectHandle, pkcs11.ObjectHandle, error)

	SignInit(h pkcs11.SessionHandle, m []*pkcs11.Mechanism, key pkcs11.ObjectHandle) error
	Sign(h pkcs11.SessionHandle, data []byte) ([]byte, error)
	DecryptInit(h pkcs11.SessionHandle, m []*pkcs11.Mechanism, key pkcs11.ObjectHandle) error
	Decrypt(h pkcs11.SessionHandle, ciphertext []byte) ([]byte, error)

	// SignSingle is C_SignInit and C_Sign in one step: one crossing from Go to
	// C, no length query, and a buffer of size bytes, which is the length of
	// the signature where the algorithm fixes it. The signature is appended to
	// dst. The mechanism's parameter is passed as bytes, so it may hold no
	// pointers (CK_RSA_PKCS_PSS_PARAMS has none).
	SignSingle(dst []byte, h pkcs11.SessionHandle, m *pkcs11.Mechanism, key pkcs11.ObjectHandle, data []byte, size int) ([]byte, error)

	// SignLots signs lot after lot in one session, each message as SignSingle
	// does, and hands each lot to done, in their order, with its Signatures. It
	// ends when next returns nil and done has seen all lots, when ctx ends, or with
	// an error; then lots may have been given out that done never sees. In a
	// session it also ends, without an error, when the library restarts or the pool
	// is closed.
	//
	// While a lot is being signed next is asked for another one, again and again
	// if it has none yet. next must not wait long, and neither next nor done may use
	// the session. [SignEach] is how decorators do it.
	//
	// In a session that is [Config.Direct] lots are signed by a thread of C, beside
	// the goroutine that makes the call; in others each signature is a call with
	// a time limit of its own, and next and done run on the session's goroutine.
	SignLots(ctx context.Context, h pkcs11.SessionHandle, m *pkcs11.Mechanism, key pkcs11.ObjectHandle, size int, next func() *Lot, done func(*Lot)) error
}

// Lot is messages that are signed one after the other.
type Lot struct {
	Data       []byte // the messages, one after the other
	Ends       []uint // where each ends in Data
	Signatures []byte // one after the other, of equal size
}

// SignEach is [Module.SignLots] by calls of SignSingle.
func SignEach(ctx context.Context, m Module, h pkcs11.SessionHandle, mechanism *pkcs11.Mechanism, key pkcs11.ObjectHandle, size int, next func() *Lot, done func(*Lot)) error {
	for lot := next(); lot != nil; lot = next() {
		if err := ctx.Err(); err != nil {
			return err
		}
		lot.Signatures = lot.Signatures[:0]
		begin := uint(0)
		for i, end := range lot.Ends {
			var err error
			if lot.Signatures, err = m.SignSingle(lot.Signatures, h, mechanism, key, lot.Data[begin:end], size); err != nil {
				return err
			}
			if len(lot.Signatures) != (i+1)*size {
				return pkcs11.Error(pkcs11.CKR_SIGNATURE_LEN_RANGE)
			}
			begin = end
		}
		done(lot)
	}
	return nil
}
