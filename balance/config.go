package balance

import (
	"cmp"
	"crypto/tls"
	"fmt"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/hsmkey/hsmkey/internal/bridge"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// Remote says what an address in a balance list means.
type Remote string

// The kinds of HSMs at an address.
const (
	// RemoteP11Kit is a host that runs "p11-kit remote" behind TCP or TLS.
	RemoteP11Kit Remote = "p11-kit"
	// RemoteModule is a host that the vendor's library talks to, told by its
	// environment.
	RemoteModule Remote = "module"
)

// DefaultSuspend is how long an endpoint that does not answer is left alone.
const DefaultSuspend = 120 * time.Second

// MaxInterval is the most that Config.Refresh and Config.Suspend may be: beyond it
// a number is a mistake, not a wish.
const MaxInterval = 24 * time.Hour

// Config describes a fleet of HSMs.
type Config struct {
	// Lists are the paths of 1 to MaxLists balance lists, separated by
	// filepath.ListSeparator. Empty: no balancing.
	Lists string

	// Refresh is how often the lists are read again. Zero: at the start only.
	Refresh time.Duration

	// Suspend is how long an endpoint that does not answer is left alone before
	// one session is opened on it to see. Zero: DefaultSuspend.
	Suspend time.Duration

	// Pool is what the pools of all endpoints have in common: the token's label,
	// the PIN, the limits, which hold for each endpoint. Pool.Module is the
	// library of RemoteModule. What a PKCS#11 URI says goes before.
	Pool sessionpool.Config

	// Remote says what "<address> <port>" means. Empty: RemoteP11Kit.
	Remote Remote

	// RemoteEnv tells the library of RemoteModule where its HSM is: NAME=value
	// pairs separated by blanks, in which {host} and {port} are replaced.
	RemoteEnv string

	// TLSCA, TLSCert and TLSKey are PEM files for TLS 1.3 with mutual
	// authentication to RemoteP11Kit. All or none.
	TLSCA, TLSCert, TLSKey string

	// Plaintext allows RemoteP11Kit without TLS beyond loopback addresses. PINs
	// travel there.
	Plaintext bool

	// OnEvent, when set, is told what happens to endpoints and lists. It is called
	// without locks held and must return soon, without asking the Balancer for
	// sessions. What happens to sessions, Pool.OnEvent is told.
	OnEvent func(Event)
}

// settings is a checked Config.
type settings struct {
	Config
	tls    *tls.Config
	client string   // p11-kit's client library, if it is installed
	env    []string // RemoteEnv, split
}

func (c Config) check() (*settings, error) {
	bad := func(format string, args ...any) (*settings, error) {
		return nil, fmt.Errorf("%w: %s", sessionpool.ErrConfig, fmt.Sprintf(format, args...))
	}
	switch {
	case c.Refresh < 0 || c.Refresh > MaxInterval:
		return bad("the refresh interval of balance lists is %v, want 0 to %v (HSM_LB_FILE_REFRESH_INTERVAL)", c.Refresh, MaxInterval)
	case c.Suspend < 0 || c.Suspend > MaxInterval:
		return bad("the suspension time is %v, want 0 to %v (HSM_BALANCE_SUSPEND_TIME)", c.Suspend, MaxInterval)
	case c.Remote != "" && c.Remote != RemoteP11Kit && c.Remote != RemoteModule:
		return bad("the remote kind is %q, want %s or %s (HSM_REMOTE)", c.Remote, RemoteP11Kit, RemoteModule)
	}
	if err := c.Pool.Check(); err != nil {
		return nil, err
	}
	s := &settings{Config: c, env: strings.Fields(c.RemoteEnv), client: findClient(c.Pool.Module)}
	s.Suspend = cmp.Or(c.Suspend, DefaultSuspend)
	s.Remote = cmp.Or(c.Remote, RemoteP11Kit)
	for _, pair := range s.env {
		if name, value, ok := strings.Cut(pair, "="); !ok || name == "" || value == "" {
			return bad("%q is not NAME=value (HSM_REMOTE_ENV)", pair)
		}
		if rest := strings.NewReplacer("{host}", "", "{port}", "").Replace(pair); strings.ContainsAny(rest, "{}") {
			return bad("%q: there are {host} and {port} to be replaced, and nothing else (HSM_REMOTE_ENV)", pair)
		}
	}
	if s.Remote == RemoteModule && !strings.Contains(c.RemoteEnv, "{host}") {
		return bad("with the remote kind %s the library must be told where its HSM is, as in DFENCE_PKCS11_IP={host} (HSM_REMOTE_ENV)", RemoteModule)
	}
	if c.TLSCA+c.TLSCert+c.TLSKey != "" {
		config, err := bridge.LoadTLS(c.TLSCA, c.TLSCert, c.TLSKey)
		if err != nil {
			return nil, err
		}
		s.tls = config
	}
	return s, nil
}

// accept checks lists against the rest of the configuration, before anything
// is connected to.
func (s *settings) accept(lists Lists) error {
	for _, list := range lists {
		for _, e := range list.Endpoints {
			switch {
			case e.ModulePath != "":
				continue
			case s.Remote == RemoteModule && s.Pool.Module == "":
				return fmt.Errorf("%w: no PKCS#11 library is configured for %s (set HSM_MODULE or --module)", sessionpool.ErrConfig, e)
			case s.Remote == RemoteModule:
				continue
			}
			if s.client == "" {
				return fmt.Errorf("%w: p11-kit-client.so is not installed (Debian: p11-kit-modules)", sessionpool.ErrConfig)
			}
			if s.tls != nil || s.Plaintext {
				continue
			}
			if ip, err := netip.ParseAddr(e.Host); err == nil && !ip.Unmap().IsLoopback() {
				return &ListError{File: list.Path, Line: e.line, Column: e.column, Reason: fmt.Sprintf("%s would be reached without encryption, and PINs travel there: "+
					"set HSM_TLS_CA, HSM_TLS_CERT and HSM_TLS_KEY, or HSM_REMOTE_PLAINTEXT=1 if the network is safe", e)}
			}
		}
	}
	return nil
}

// clientPlaces are where systems install p11-kit's client.
var clientPlaces = []string{
	"/usr/lib/*-linux-gnu*/pkcs11/p11-kit-client.so",
	"/usr/lib64/pkcs11/p11-kit-client.so",
	"/usr/lib/pkcs11/p11-kit-client.so",
	"/usr/local/lib/pkcs11/p11-kit-client.so",
	"/opt/homebrew/lib/pkcs11/p11-kit-client.so",
}

func findClient(module string) string {
	if strings.Contains(filepath.Base(module), "p11-kit-client") {
		return module
	}
	for _, place := range clientPlaces {
		if found, err := filepath.Glob(place); err == nil && len(found) > 0 {
			return found[0]
		}
	}
	return ""
}

// environment fills an address into RemoteEnv.
func (s *settings) environment(e Endpoint) []string {
	fill := strings.NewReplacer("{host}", e.Host, "{port}", strconv.Itoa(int(e.Port)))
	pairs := make([]string, len(s.env))
	for i, pair := range s.env {
		pairs[i] = fill.Replace(pair)
	}
	return pairs
}

// opTimeout is how long one PKCS#11 call may take.
func (s *settings) opTimeout() time.Duration {
	return cmp.Or(s.Pool.OpTimeout, sessionpool.DefaultOpTimeout)
}
