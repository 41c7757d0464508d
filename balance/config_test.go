package balance_test

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hsmkey/hsmkey/balance"
	"github.com/hsmkey/hsmkey/internal/testhsm"
	"github.com/hsmkey/hsmkey/sessionpool"
)

func TestConfigurationsThatCannotWorkAreRefused(t *testing.T) {
	files := testhsm.NewTLSFiles(t)
	remoteList, local := list(t, "10.0.20.1 4433\n"), list(t, "127.0.0.2 4433\n")
	seventeen := strings.Repeat(local+string(filepath.ListSeparator), 16) + local
	garbage := filepath.Join(t.TempDir(), "garbage.pem")
	if err := os.WriteFile(garbage, []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name   string
		change func(*balance.Config)
		want   string // part of the error, "" for none
	}{
		{"nothing but a list", func(*balance.Config) {}, ""},
		{"no list", func(c *balance.Config) { c.Lists = "" }, "0 balance lists, want 1 to 16 (HSM_LOAD_BALANCE_LIST)"},
		{"seventeen lists", func(c *balance.Config) { c.Lists = seventeen }, "17 balance lists, want 1 to 16 (HSM_LOAD_BALANCE_LIST)"},
		{"a list without a path", func(c *balance.Config) { c.Lists = paths(local, "") }, "balance list 2 is empty (HSM_LOAD_BALANCE_LIST)"},
		{"a list that is not there", func(c *balance.Config) { c.Lists = "/nowhere/list" }, "/nowhere/list"},
		{"the second is not there", func(c *balance.Config) { c.Lists = paths(local, "/nowhere/list") }, "/nowhere/list"},
		{"a negative refresh", func(c *balance.Config) { c.Refresh = -time.Second }, "refresh"},
		{"an absurd refresh", func(c *balance.Config) { c.Refresh = 25 * time.Hour }, "HSM_LB_FILE_REFRESH_INTERVAL"},
		{"a negative suspension", func(c *balance.Config) { c.Suspend = -1 }, "suspension"},
		{"an absurd suspension", func(c *balance.Config) { c.Suspend = 25 * time.Hour }, "HSM_BALANCE_SUSPEND_TIME"},
		{"the longest intervals", func(c *balance.Config) { c.Suspend, c.Refresh = balance.MaxInterval, balance.MaxInterval }, ""},
		{"an unknown kind", func(c *balance.Config) { c.Remote = "telnet" }, `"telnet"`},
		{"a module without its address", func(c *balance.Config) { c.Remote = balance.RemoteModule }, "HSM_REMOTE_ENV"},
		{"a module that is told no address", func(c *balance.Config) { c.Remote, c.RemoteEnv = balance.RemoteModule, "A={port}" }, "HSM_REMOTE_ENV"},
		{"no NAME=value", func(c *balance.Config) { c.Remote, c.RemoteEnv = balance.RemoteModule, "A={host} {port}" }, `"{port}"`},
		{"no name", func(c *balance.Config) { c.RemoteEnv = "={host}" }, "HSM_REMOTE_ENV"},
		{"no value", func(c *balance.Config) { c.RemoteEnv = "A=" }, "HSM_REMOTE_ENV"},
		{"an unknown placeholder", func(c *balance.Config) { c.RemoteEnv = "A={hots}" }, "{hots}"},
		{"a module without library", func(c *balance.Config) { c.Remote, c.RemoteEnv, c.Pool.Module = balance.RemoteModule, "A={host}", "" }, "HSM_MODULE"},
		{"a negative number of sessions", func(c *balance.Config) { c.Pool.MaxSessions = -5 }, "MaxSessions"},
		{"an absurd number of sessions", func(c *balance.Config) { c.Pool.MaxSessions = 1 << 20 }, "MaxSessions"},
		{"a negative timeout", func(c *balance.Config) { c.Pool.OpTimeout = -1 }, "OpTimeout"},
		{"plaintext beyond this machine", func(c *balance.Config) { c.Lists = remoteList }, "without encryption"},
		{"the same in the second list", func(c *balance.Config) { c.Lists = paths(local, remoteList) }, "without encryption"},
		{"plaintext that is allowed", func(c *balance.Config) { c.Lists, c.Plaintext = remoteList, true }, ""},
		{"TLS", func(c *balance.Config) {
			c.Lists, c.TLSCA, c.TLSCert, c.TLSKey = remoteList, files.CA, files.ClientCert, files.ClientKey
		}, ""},
		{"TLS without authority", func(c *balance.Config) { c.TLSCert, c.TLSKey = files.ClientCert, files.ClientKey }, "HSM_TLS_CA"},
		{"TLS without certificate", func(c *balance.Config) { c.TLSCA, c.TLSKey = files.CA, files.ClientKey }, "HSM_TLS_CERT"},
		{"TLS without key", func(c *balance.Config) { c.TLSCA, c.TLSCert = files.CA, files.ClientCert }, "HSM_TLS_KEY"},
		{"TLS with another key", func(c *balance.Config) { c.TLSCA, c.TLSCert, c.TLSKey = files.CA, files.ClientCert, files.ServerKey }, files.ServerKey},
		{"TLS with garbage", func(c *balance.Config) { c.TLSCA, c.TLSCert, c.TLSKey = garbage, files.ClientCert, files.ClientKey }, garbage},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := balance.Config{Lists: local, Pool: sessionpool.Config{Module: testhsm.ModulePath()}}
			test.change(&c)
			b, err := balance.New(c)
			if b != nil {
				closeBalancer(t, b)
			}
			switch {
			case test.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case test.want != "" && (!errors.Is(err, sessionpool.ErrConfig) || !strings.Contains(err.Error(), test.want)):
				t.Errorf("got %v, want ErrConfig and %q", err, test.want)
			}
			if err != nil && strings.Contains(err.Error(), "garbage\n") {
				t.Errorf("the error quotes a file: %v", err)
			}
		})
	}
}

func TestEventsAreWrittenToALog(t *testing.T) {
	var text strings.Builder
	log := balance.LogEvents(slog.New(slog.NewTextHandler(&text, nil)))
	log(balance.Event{Kind: balance.Suspended, Endpoint: "hsm-a:4433", Err: errors.New("no answer")})
	log(balance.Event{Kind: balance.Reloaded})
	log(balance.Event{Kind: balance.ListSwitched, List: "/etc/passive"})
	for _, want := range []string{
		`level=WARN msg="hsm endpoint suspended" event.kind="endpoint suspended" event.endpoint=hsm-a:4433 event.error="no answer"`,
		`level=INFO msg="hsm balance lists reloaded"`,
		`level=WARN msg="hsm balance list switched"`, `event.list=/etc/passive`,
	} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("the log lacks %s:\n%s", want, &text)
		}
	}
	for kind := balance.Suspended; kind <= balance.ReloadFailed; kind++ {
		if kind.String() == "" {
			t.Errorf("event kind %d has no name", kind)
		}
	}
}
