package hsmkey

import (
	"context"

	"github.com/hsmkey/hsmkey/balance"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// HSM is a source of sessions together with the keys that they reach. It is
// safe for concurrent use.
type HSM struct {
	source   sessionpool.Source
	balancer *balance.Balancer // nil: one HSM
	close    func(context.Context) error

	// making is held while a key is made, so that two keys that want the same
	// label do not pass the check for it at once.
	making chan struct{}
}

// Open loads the PKCS#11 module and finds the token, or reads the balance lists
// if there are any. It does not log in: that happens with the first key, where a
// wrong PIN shows as ErrPIN.
//
// The error matches ErrConfig if the configuration is wrong or no token or
// several match it, ErrSession or ErrTimeout if the module does not answer.
func Open(ctx context.Context, config Config) (*HSM, error) {
	if ctx.Err() != nil {
		return nil, ended(ctx, "opening the HSM")
	}
	if config.Balance.Lists != "" {
		fleet := config.Balance
		fleet.Pool = config.Pool
		b, err := balance.New(fleet)
		if err != nil {
			return nil, err
		}
		return &HSM{source: b, balancer: b, close: b.Close, making: make(chan struct{}, 1)}, nil
	}
	pool, err := sessionpool.New(config.Pool)
	if err != nil {
		return nil, err
	}
	return &HSM{source: pool, close: pool.Close, making: make(chan struct{}, 1)}, nil
}

// Source returns where the HSM takes its sessions from, for uses of the token
// beyond keys.
func (h *HSM) Source() sessionpool.Source { return h.source }

// Balancer returns the balancer over the HSMs of the balance lists, or nil where
// there is one HSM.
func (h *HSM) Balancer() *balance.Balancer { return h.balancer }

// Close waits for signatures under way, closes every session, and finalises the
// module if nobody else in the process uses it. When ctx ends first, Close
// returns its error and the rest happens in the background. Keys of a closed HSM
// answer ErrClosed.
func (h *HSM) Close(ctx context.Context) error { return h.close(ctx) }

// Key finds the one key that the query matches; see [FromHSM] for its errors.
func (h *HSM) Key(ctx context.Context, query Query) (*HSMJWK, error) {
	return FromHSM(ctx, h.source, query)
}

// WithSession opens an HSM, runs fn with a session on it, and closes both on
// every path. It suits programs that do one thing and end; others keep an [HSM].
func WithSession(ctx context.Context, config Config, fn func(*sessionpool.Session) error) (err error) {
	h, err := Open(ctx, config)
	if err != nil {
		return err
	}
	defer func() {
		if closing := h.Close(context.WithoutCancel(ctx)); err == nil {
			err = closing
		}
	}()
	s, err := h.source.Acquire(ctx)
	if err != nil {
		return err
	}
	defer s.Release()
	return fn(s)
}
