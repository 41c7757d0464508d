package doctor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/balance"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// Options say what to check.
type Options struct {
	Config hsmkey.Config
	PIN    PINOrigin    // where Config.Pool.PIN comes from
	Key    hsmkey.Query // the key that is needed; the zero one: none in particular
}

// examination is one run.
type examination struct {
	Options
	report *Report
	checks checks // of the report
}

// closeTime bounds how long Run waits for calls that hang.
const closeTime = 2 * time.Second

// Run makes all checks. Endpoints are examined at the same time, so that it takes
// about Config.Pool.OpTimeout where some of them are dead. A PIN that a token
// rejects is sent once in all. It makes no changes.
func Run(ctx context.Context, options Options) *Report {
	x := &examination{Options: options, report: &Report{}}
	if options.Config.Balance.Lists == "" {
		x.one(ctx)
	} else {
		x.fleet(ctx)
	}
	x.report.Checks = x.checks
	x.report.conclude()
	return x.report
}

func (x *examination) keyWanted() bool { return x.Key.Label != "" || len(x.Key.ID) > 0 }

// one examines one HSM.
func (x *examination) one(ctx context.Context) {
	if !x.library(ctx) {
		return
	}
	x.checks.checkPINSource(x.PIN)
	x.open(ctx, "token", "choose a token with --token or HSM_TOKEN", func(h *hsmkey.HSM) {
		e := &Endpoint{Transport: InProcess}
		x.report.Endpoints = []*Endpoint{e}
		x.examine(ctx, e, h.Source())
	})
}

// library looks at the PKCS#11 library, and reports whether it is worth going on.
func (x *examination) library(ctx context.Context) bool {
	info, err := sessionpool.Inspect(ctx, x.Config.Pool)
	if err != nil {
		hint := "is the PKCS#11 library installed? --module or HSM_MODULE names it"
		switch {
		case errors.Is(err, hsmkey.ErrTimeout):
			hint = "does the library wait for its HSM? --timeout gives it longer"
		case errors.Is(err, hsmkey.ErrSession):
			hint = "its own configuration and log may tell more (of SoftHSM2: SOFTHSM2_CONF, and the system's log; of NSS: HSM_MODULE_ARGS)"
		}
		x.checks.fail("module", err, hint)
		return false
	}
	x.checks.ok("module", "%s: %s, version %s, PKCS #11 %s", info.Path, info.Description, info.Version, info.Cryptoki)

	var words []string
	var odd error
	tokens := 0
	for _, s := range info.Slots {
		switch {
		case s.Err != nil:
			odd = errors.Join(odd, s.Err)
		case s.Token == nil:
		case s.Token.Initialized():
			tokens++
			words = append(words, fmt.Sprintf("%q in slot %d", s.Token.Label, s.Slot))
		}
	}
	const hint = "is the device connected, and its token initialised? `hsmkey init` makes a token for development"
	switch {
	case len(info.Slots) == 0:
		x.checks.fail("slots", failure(hsmkey.ErrConfig, nil, "the library shows no slot"), hint)
	case tokens == 0 && odd != nil:
		x.checks.fail("slots", failure(hsmkey.ErrSession, odd, "no token answers"), hint)
	case tokens == 0:
		x.checks.fail("slots", failure(hsmkey.ErrConfig, nil, "%s, but no token", count(len(info.Slots), "slot")), hint)
	case odd != nil:
		x.checks.warn("slots", "if that is the wrong device, there is nothing to do", "%s; one does not answer: %v", strings.Join(words, ", "), odd)
	default:
		x.checks.ok("slots", "%s, %s: %s", count(len(info.Slots), "slot"), count(tokens, "token"), strings.Join(words, ", "))
	}
	return tokens > 0
}

// fleet examines every endpoint of the balance lists.
func (x *examination) fleet(ctx context.Context) {
	const hint = "one endpoint a line, `ADDRESS PORT` or a PKCS#11 URI, as in docs/load-balancing.md"
	x.open(ctx, "lists", hint, func(h *hsmkey.HSM) {
		members := h.Balancer().Members()
		x.checks.ok("lists", "%s", listsInWords(h.Balancer().Stats(), len(members)))
		if slices.ContainsFunc(members, wantsPIN) {
			x.checks.checkPINSource(x.PIN)
		}
		var group sync.WaitGroup
		for _, m := range members {
			e := &Endpoint{Name: m.Name, List: m.List, Transport: x.transport(m.Endpoint())}
			x.report.Endpoints = append(x.report.Endpoints, e)
			group.Go(func() {
				x.examineMember(ctx, e, m)
			})
		}
		group.Wait()
		if x.keyWanted() {
			compareAsked(x.report.Endpoints)
		} else {
			x.report.Keys = compare(x.report.Endpoints)
		}
	})
}

// open opens the HSM, or the balance lists, and closes it when fn is done. A call
// that hangs is not waited for.
func (x *examination) open(ctx context.Context, check, hint string, fn func(*hsmkey.HSM)) {
	h, err := hsmkey.Open(ctx, x.Config)
	if err != nil {
		if errors.Is(err, hsmkey.ErrTimeout) {
			hint = "is the HSM up? --timeout gives it longer"
		}
		x.checks.fail(check, err, hint)
		return
	}
	fn(h)
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTime)
	defer cancel()
	_ = h.Close(end) // what did not end by then is in the report
}

// wantsPIN reports whether an endpoint uses the PIN that is for all.
func wantsPIN(m balance.Member) bool {
	e := m.Endpoint()
	return e.PINSource == "" && e.PINValue() == ""
}

func (x *examination) transport(e balance.Endpoint) Transport {
	switch {
	case e.ModulePath != "":
		return InProcess
	case x.Config.Balance.Remote == balance.RemoteModule:
		return Vendor
	case x.Config.Balance.TLSCA != "":
		return TLS
	}
	return Plaintext
}

func listsInWords(stats balance.Stats, endpoints int) string {
	var words []string
	for _, l := range stats.Lists {
		words = append(words, fmt.Sprintf("%s (%d)", l.Path, len(l.Endpoints)))
	}
	return fmt.Sprintf("%s, %s: %s", count(len(words), "list"), count(endpoints, "endpoint"), strings.Join(words, ", "))
}

// count is a number with its noun.
func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
