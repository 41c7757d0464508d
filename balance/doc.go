// Package balance decides which HSM serves the next session.
package balance
