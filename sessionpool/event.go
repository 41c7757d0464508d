package sessionpool

import (
	"context"
	"log/slog"
)

// EventKind says what happened.
type EventKind uint8

// What happens in a pool.
const (
	SessionOpened  EventKind = iota + 1 // a physical session was opened
	SessionClosed                       // a physical session was closed, see Event.Cause
	LoggedIn                            // the user was logged in
	LoginLost                           // somebody logged the user out
	Recovered                           // a call was made again on a renewed session, see Event.Err
	LimitLowered                        // the token bears fewer sessions than MaxSessions
	CallTimedOut                        // a call took longer than OpTimeout; its session is an orphan
	OrphanReturned                      // a call that its caller had left came back
	HSMDown                             // no session can be opened, or calls fail again and again, see Event.Err
	LeftOut                             // a key cannot be used on this token and another one was turned to, see Event.Err
)

var eventNames = map[EventKind]string{
	SessionOpened: "session opened", SessionClosed: "session closed",
	LoggedIn: "logged in", LoginLost: "login lost", Recovered: "session recovered",
	LimitLowered: "session limit lowered", CallTimedOut: "call timed out",
	OrphanReturned: "orphan returned", HSMDown: "HSM down",
	LeftOut: "token left out for a key",
}

func (k EventKind) String() string { return eventNames[k] }

// CloseCause says why a physical session was closed.
type CloseCause uint8

// Why sessions are closed.
const (
	CloseAsked CloseCause = iota + 1 // Close, Bypass, no cache, or the end of the pool
	CloseIdle                        // idle for longer than IdleTimeout
	CloseLost                        // broken: session, login, token or HSM were lost
	CloseLimit                       // to make room for a session of another kind, or to keep a smaller limit
)

var causeNames = map[CloseCause]string{
	CloseAsked: "asked", CloseIdle: "idle", CloseLost: "lost", CloseLimit: "limit",
}

func (c CloseCause) String() string { return causeNames[c] }

// Event is told to Config.OnEvent. It holds no secret.
type Event struct {
	Kind  EventKind
	Token string     // Token.Name
	Cause CloseCause // of SessionClosed
	Err   error      // what led to it, or nil
}

// LogValue makes an Event a group of attributes in log/slog.
func (e Event) LogValue() slog.Value {
	attrs := []slog.Attr{slog.String("kind", e.Kind.String()), slog.String("token", e.Token)}
	if e.Cause != 0 {
		attrs = append(attrs, slog.String("cause", e.Cause.String()))
	}
	if e.Err != nil {
		attrs = append(attrs, slog.String("error", e.Err.Error()))
	}
	return slog.GroupValue(attrs...)
}

// LogEvents is a Config.OnEvent that writes to a logger: trouble as warnings,
// the rest at debug level.
func LogEvents(logger *slog.Logger) func(Event) {
	return func(e Event) {
		level := slog.LevelDebug
		switch e.Kind {
		case LoginLost, Recovered, LimitLowered, CallTimedOut, OrphanReturned, HSMDown, LeftOut:
			level = slog.LevelWarn
		}
		logger.LogAttrs(context.Background(), level, "hsm "+e.Kind.String(), slog.Any("event", e))
	}
}
