// Package sessionpool holds PKCS#11 sessions: it loads a module once, logs in
// once, hands out cached sessions, and notices and replaces broken ones.
//
//	pool, err := sessionpool.New(sessionpool.Config{
//		Module:     "/usr/lib/softhsm/libsofthsm2.so",
//		TokenLabel: "demo",
//		PIN:        sessionpool.PINFile("/run/secrets/pin"),
//	})
//	...
//	defer pool.Close(ctx)
//	err = pool.With(ctx, func(s *sessionpool.Session) error {
//		return s.Do(ctx, func(m sessionpool.Module, h pkcs11.SessionHandle) error {
//			...
//		})
//	})
//
// # Sessions
//
// A logical [Session] is the right to use one physical PKCS#11 session. Release
// gives the physical session back to a cache, from which the next Acquire of the
// same kind takes it, newest first; what stays unused for IdleTimeout is closed.
// [Session.Do] is the only way to the session's handle: there a call gets its
// deadline, a hang is noticed, a return code is judged, and what was lost is
// renewed.
//
// # Logins
//
// A PKCS#11 login belongs to the application and the token, not to a session.
// All pools of a process on one token share its login, its cache and its limits.
// An anchor, a session that nobody uses, keeps the login while sessions come and
// go; it is closed with the last of them. A wrong PIN costs one attempt, however
// many callers there are: see [PINGuard].
//
// # Goroutines
//
// Each physical session has a goroutine that makes every call on it, because a
// PKCS#11 call cannot be cancelled: callers wait for it and can leave. Each
// token has one that closes idle sessions. No lock is held across a call into a
// module. Close ends all of them; only a call that hangs in a module keeps its
// goroutine, until it comes back.
package sessionpool
