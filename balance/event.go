package balance

import (
	"context"
	"log/slog"
)

// EventKind says what happened.
type EventKind uint8

// What happens to a fleet.
const (
	Suspended    EventKind = iota + 1 // an endpoint does not answer, see Event.Err
	Resumed                           // it answers again
	LeftOut                           // a key cannot be used on an endpoint, see Event.Err
	ListSwitched                      // another list is the current one, see Event.List
	Reloaded                          // the lists were read again and have changed
	ReloadFailed                      // they were read again and are invalid: the old ones stay
)

var eventNames = map[EventKind]string{
	Suspended: "endpoint suspended", Resumed: "endpoint resumed", LeftOut: "endpoint left out for a key", ListSwitched: "balance list switched",
	Reloaded: "balance lists reloaded", ReloadFailed: "balance lists not reloaded",
}

func (k EventKind) String() string { return eventNames[k] }

// Event is told to Config.OnEvent. It holds no secret.
type Event struct {
	Kind     EventKind
	Endpoint string // of Suspended, Resumed and LeftOut
	List     string // of ListSwitched: its path
	Err      error  // what led to it, or nil
}

// LogValue makes an Event a group of attributes in log/slog.
func (e Event) LogValue() slog.Value {
	attrs := []slog.Attr{slog.String("kind", e.Kind.String())}
	if e.Endpoint != "" {
		attrs = append(attrs, slog.String("endpoint", e.Endpoint))
	}
	if e.List != "" {
		attrs = append(attrs, slog.String("list", e.List))
	}
	if e.Err != nil {
		attrs = append(attrs, slog.String("error", e.Err.Error()))
	}
	return slog.GroupValue(attrs...)
}

// LogEvents is a Config.OnEvent that writes to a logger: trouble as warnings,
// the rest as information.
func LogEvents(logger *slog.Logger) func(Event) {
	return func(e Event) {
		level := slog.LevelInfo
		switch e.Kind {
		case Suspended, LeftOut, ListSwitched, ReloadFailed:
			level = slog.LevelWarn
		}
		logger.LogAttrs(context.Background(), level, "hsm "+e.Kind.String(), slog.Any("event", e))
	}
}
