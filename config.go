package hsmkey

import (
	"time"

	"github.com/hsmkey/hsmkey/balance"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// Config says which HSM to use and how. [FromEnv] fills one from the
// environment.
type Config struct {
	// Pool is the module, the token, its PIN, and the limits of sessions.
	Pool sessionpool.Config

	// Balance spreads sessions over the HSMs of balance lists, if it names any.
	// Its own field Pool is not used: all endpoints have Pool above in common.
	Balance balance.Config

	// PixRefresh is how long objects that a TLS connection to Pix rests on, the
	// private key and its certificates, are used before they are read from the
	// HSM again. Zero: they are read for each connection.
	PixRefresh time.Duration
}
