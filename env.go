package hsmkey

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/hsmkey/hsmkey/balance"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// The environment variables that FromEnv reads. One that is set to nothing
// counts as unset, except HSM_PIN: an empty PIN is an error when it is due.
const (
	envModule       = "HSM_MODULE"
	envModuleArgs   = "HSM_MODULE_ARGS"
	envToken        = "HSM_TOKEN"
	envPIN          = "HSM_PIN"
	envPINFile      = "HSM_PIN_FILE"
	envDisableCache = "HSM_DISABLE_SESSION_CACHE"
	envOpTimeout    = "HSM_OP_TIMEOUT"
	envPixRefresh   = "HSM_PIX_HTTP_CONN_REFRESH_INTERVAL"
	envBalanceList  = "HSM_LOAD_BALANCE_LIST"
	envListRefresh  = "HSM_LB_FILE_REFRESH_INTERVAL"
	envSuspendTime  = "HSM_BALANCE_SUSPEND_TIME"
	envRemote       = "HSM_REMOTE"
	envRemoteEnv    = "HSM_REMOTE_ENV"
	envPlaintext    = "HSM_REMOTE_PLAINTEXT"
	envTLSCA        = "HSM_TLS_CA"
	envTLSCert      = "HSM_TLS_CERT"
	envTLSKey       = "HSM_TLS_KEY"
)

// FromEnv reads the configuration from the environment:
//
//   - HSM_MODULE: the PKCS#11 library; the first SoftHSM2 in the usual places
//   - HSM_MODULE_ARGS: the initialisation string of modules that want one (NSS)
//   - HSM_TOKEN: the token's label; the only token with a user PIN
//   - HSM_PIN, HSM_PIN_FILE: the user PIN, or a file that holds it; with neither,
//     Config.Pool.PIN is nil and sessions are not logged in
//   - HSM_DISABLE_SESSION_CACHE: 1 closes each session when it is released; 0
//   - HSM_OP_TIMEOUT: how long one PKCS#11 call may take, such as 10s or 1m, or
//     in seconds; 10s
//   - HSM_LOAD_BALANCE_LIST: 1 to 16 balance lists, separated by ":" (";" on
//     Windows); no balancing
//   - HSM_LB_FILE_REFRESH_INTERVAL: seconds after which the lists are read again;
//     0, at the start only
//   - HSM_BALANCE_SUSPEND_TIME: seconds for which an HSM that does not answer is
//     left alone; 120
//   - HSM_REMOTE: what an address in a list means, p11-kit or module; p11-kit
//   - HSM_REMOTE_ENV: what tells HSM_MODULE the address with HSM_REMOTE=module,
//     such as DFENCE_PKCS11_IP={host}
//   - HSM_TLS_CA, HSM_TLS_CERT, HSM_TLS_KEY: PEM files for TLS to p11-kit
//   - HSM_REMOTE_PLAINTEXT: 1 allows p11-kit without TLS beyond loopback; 0
//   - HSM_PIX_HTTP_CONN_REFRESH_INTERVAL: seconds for which objects of a TLS
//     connection to Pix are used before they are read again; 0, each time
//
// No time is longer than a day. A value that cannot be used is ErrConfig, which names the variable and, unless
// it is a PIN, the value.
func FromEnv() (Config, error) {
	var config Config
	if err := poolFromEnv(&config.Pool); err != nil {
		return Config{}, err
	}
	if err := balanceFromEnv(&config.Balance); err != nil {
		return Config{}, err
	}
	refresh, err := envSeconds(envPixRefresh)
	if err != nil {
		return Config{}, err
	}
	config.PixRefresh = refresh
	return config, nil
}

// poolFromEnv reads what concerns one module, token and its sessions.
func poolFromEnv(pool *sessionpool.Config) (err error) {
	pool.Module = os.Getenv(envModule)
	if pool.Module == "" {
		pool.Module = defaultModule()
	}
	pool.ModuleArgs = os.Getenv(envModuleArgs)
	pool.TokenLabel = os.Getenv(envToken)
	if pool.PIN, err = envPINSource(); err != nil {
		return err
	}
	if pool.DisableCache, err = envSwitch(envDisableCache); err != nil {
		return err
	}
	pool.OpTimeout, err = envTimeout(envOpTimeout)
	return err
}

// balanceFromEnv reads what concerns many HSMs.
func balanceFromEnv(b *balance.Config) (err error) {
	b.Lists = os.Getenv(envBalanceList)
	if b.Refresh, err = envSeconds(envListRefresh); err != nil {
		return err
	}
	if b.Suspend, err = envSeconds(envSuspendTime); err != nil {
		return err
	}
	if b.Suspend == 0 && os.Getenv(envSuspendTime) != "" {
		return fmt.Errorf("%w: %s is %q, want at least 1 second", ErrConfig, envSuspendTime, os.Getenv(envSuspendTime))
	}
	switch b.Remote = balance.Remote(os.Getenv(envRemote)); b.Remote {
	case "", balance.RemoteP11Kit, balance.RemoteModule:
	default:
		return fmt.Errorf("%w: %s is %q, want %s or %s", ErrConfig, envRemote, b.Remote, balance.RemoteP11Kit, balance.RemoteModule)
	}
	b.RemoteEnv = os.Getenv(envRemoteEnv)
	b.TLSCA, b.TLSCert, b.TLSKey = os.Getenv(envTLSCA), os.Getenv(envTLSCert), os.Getenv(envTLSKey)
	b.Plaintext, err = envSwitch(envPlaintext)
	return err
}

// envPINSource reads where the PIN comes from.
func envPINSource() (sessionpool.PINSource, error) {
	pin, set := os.LookupEnv(envPIN)
	file := os.Getenv(envPINFile)
	switch {
	case pin != "" && file != "":
		return nil, fmt.Errorf("%w: %s and %s are both set; unset one", ErrConfig, envPIN, envPINFile)
	case file != "":
		return sessionpool.PINFile(file), nil
	case set:
		return sessionpool.StaticPIN(pin), nil
	}
	return nil, nil
}

// envSwitch reads 0 or 1; unset is 0.
func envSwitch(name string) (bool, error) {
	switch value := os.Getenv(name); value {
	case "", "0":
		return false, nil
	case "1":
		return true, nil
	default:
		return false, fmt.Errorf("%w: %s is %q, want 0 or 1", ErrConfig, name, value)
	}
}

// maxTime bounds every duration, as the packages do that they are for: nobody is
// told later of a number without its variable.
const maxTime = balance.MaxInterval

// envTimeout reads a duration, or a number of seconds, that is more than
// nothing; unset is zero, which stands for the default.
func envTimeout(name string) (time.Duration, error) {
	value := os.Getenv(name)
	if value == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(value)
	if seconds, plain := strconv.ParseUint(value, 10, 32); plain == nil {
		d, err = time.Duration(seconds)*time.Second, nil
	}
	if err != nil || d <= 0 || d > maxTime {
		return 0, fmt.Errorf("%w: %s is %q, want a time such as 10s, 500ms or 10 (seconds), at most %v", ErrConfig, name, value, maxTime)
	}
	return d, nil
}

// envSeconds reads a number of seconds; unset is 0.
func envSeconds(name string) (time.Duration, error) {
	value := os.Getenv(name)
	if value == "" {
		return 0, nil
	}
	seconds, err := strconv.ParseUint(value, 10, 32)
	d := time.Duration(seconds) * time.Second
	if err != nil || d > maxTime {
		return 0, fmt.Errorf("%w: %s is %q, want a number of seconds from 0 to %.0f", ErrConfig, name, value, maxTime.Seconds())
	}
	return d, nil
}

// softHSMPlaces are where systems install SoftHSM2.
var softHSMPlaces = []string{
	"/usr/lib/softhsm/libsofthsm2.so",
	"/usr/lib/*-linux-gnu*/softhsm/libsofthsm2.so",
	"/usr/lib64/softhsm/libsofthsm2.so",
	"/usr/lib64/pkcs11/libsofthsm2.so",
	"/usr/lib/pkcs11/libsofthsm2.so",
	"/usr/local/lib/softhsm/libsofthsm2.so",
	"/opt/homebrew/lib/softhsm/libsofthsm2.so",
}

// defaultModule is the first SoftHSM2 that is installed, or nothing.
func defaultModule() string {
	for _, place := range softHSMPlaces {
		paths, err := filepath.Glob(place)
		if err != nil {
			continue // a constant of ours
		}
		for _, path := range paths {
			if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
				return path
			}
		}
	}
	return ""
}
