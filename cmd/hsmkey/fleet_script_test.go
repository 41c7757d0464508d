package main

import (
	"fmt"
	"net"
	"os"
	"sync"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/hsmkey/hsmkey/internal/testhsm"
)

// hsms makes the command of scripts that runs HSMs at addresses of this machine:
// hsm start NAME..., hsm stop|continue|kill|restart NAME... Each has a token of its own,
// and all have the PIN that is in fleet.pin. $NAME is then what a balance list
// says of it, and $NAME_AT how hsmkey calls it.
func hsms(t *testing.T) func(*testscript.TestScript, bool, []string) {
	var servers sync.Map // by script and name
	return func(ts *testscript.TestScript, neg bool, args []string) {
		if neg || len(args) < 2 {
			ts.Fatalf("usage: hsm start|stop|continue|kill|restart NAME...")
		}
		for _, name := range args[1:] {
			key := ts.Getenv("WORK") + "/" + name
			if args[0] == "start" {
				tb := scriptTB{t, ts}
				server := testhsm.Remote(tb, testhsm.NewDetached(tb, "fleet"), "127.0.0.1:0")
				servers.Store(key, server)
				host, port, err := net.SplitHostPort(server.Address)
				ts.Check(err)
				ts.Setenv(name, host+" "+port)
				ts.Setenv(name+"_AT", server.Address)
				ts.Check(os.WriteFile(ts.MkAbs("fleet.pin"), []byte(testhsm.PIN), 0o600))
				continue
			}
			known, _ := servers.Load(key)
			server, ok := known.(*testhsm.Server)
			act := map[string]func(*testhsm.Server){
				"stop": (*testhsm.Server).Stop, "continue": (*testhsm.Server).Continue,
				"kill": (*testhsm.Server).Kill, "restart": (*testhsm.Server).Restart,
			}[args[0]]
			if !ok || act == nil {
				ts.Fatalf("hsm %s %s: there is no such thing", args[0], name)
			}
			act(server)
		}
	}
}

// scriptTB lets a script be the test that a server belongs to.
type scriptTB struct {
	testing.TB
	ts *testscript.TestScript
}

func (tb scriptTB) Helper()                           {}
func (tb scriptTB) Cleanup(f func())                  { tb.ts.Defer(f) }
func (tb scriptTB) Fatal(args ...any)                 { tb.ts.Fatalf("%s", fmt.Sprint(args...)) }
func (tb scriptTB) Fatalf(format string, args ...any) { tb.ts.Fatalf(format, args...) }
