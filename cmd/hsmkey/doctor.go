package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/doctor"
)

func (a *app) doctorCommand() *cobra.Command {
	var key keyFlags
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check whether signing works, and if not, why",
		Long: `Checks the PKCS#11 library, the token, the PIN, the login, the mechanisms and the
key, and says of each whether it is ok, and if not, what to do. With a balance
list it checks every endpoint, and whether all have the same keys. Without --key all
keys sign once, at most 16 on each endpoint.

The PIN is sent once, also when it is wrong. Nothing is changed. The exit status
is 0 if nothing failed, else that of the first failure.`,
		Example: `  hsmkey key generate my-signing --type ec:P-256
  hsmkey doctor
  hsmkey doctor --key my-signing --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var query hsmkey.Query
			if key.given() {
				var err error
				if query, err = key.query(); err != nil {
					return err
				}
			}
			config, err := a.config()
			if err != nil {
				return err
			}
			a.catchSignals()
			report := doctor.Run(cmd.Context(), doctor.Options{Config: config, PIN: pinOrigin(), Key: query})
			if err := cmd.Context().Err(); err != nil {
				return context.Cause(cmd.Context())
			}
			if asJSON {
				err = a.printJSON(report)
			} else {
				err = a.printReport(report)
			}
			return cmp.Or(err, diagnosis(report))
		},
	}
	key.register(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "one JSON object")
	return cmd
}

// pinOrigin says where a configuration has its PIN from.
func pinOrigin() doctor.PINOrigin {
	if file := os.Getenv(envPINFile); file != "" {
		return doctor.PINOrigin{File: file}
	}
	if _, set := os.LookupEnv(envPIN); set {
		return doctor.PINOrigin{Words: envPIN + " in the environment"}
	}
	return doctor.PINOrigin{Words: "asked for on the terminal"}
}

// diagnosis is the first failure of a report as the error of the command.
func diagnosis(report *doctor.Report) error {
	failures := report.Failures()
	if len(failures) == 0 {
		return nil
	}
	first := failures[0]
	err := fmt.Errorf("%s: %w", first.Name, first.Err)
	if first.Endpoint != "" && len(report.Endpoints) > 1 {
		err = fmt.Errorf("%s: %w", first.Endpoint, err)
	}
	if more := len(failures) - 1; more > 0 {
		err = fmt.Errorf("%w (and %d more)", err, more)
	}
	return withHint(err, "%s", first.Hint)
}

// printReport prints a report for people: one HSM as a list of checks, a fleet as
// a table of endpoints, and below it what is not ok.
func (a *app) printReport(report *doctor.Report) error {
	var out bytes.Buffer
	checks := report.Checks
	fleet := len(report.Endpoints) > 0 && report.Endpoints[0].List != ""
	if !fleet && len(report.Endpoints) == 1 {
		checks = slices.Concat(checks, report.Endpoints[0].Checks)
	}
	errs := []error{printChecks(&out, checks)}
	if fleet {
		errs = append(errs, printEndpoints(&out, report.Endpoints), printKeys(&out, report.Keys))
	}
	return cmp.Or(errors.Join(errs...), a.print(out.Bytes()))
}

// table aligns columns.
type table struct{ *tabwriter.Writer }

func newTable(to io.Writer) table { return table{tabwriter.NewWriter(to, 0, 0, 2, ' ', 0)} }

// row writes a line; nothing is a dash.
func (t table) row(cells ...string) {
	for i, cell := range cells {
		cells[i] = cmp.Or(plain(cell), "-")
	}
	fmt.Fprintln(t, strings.Join(cells, "\t"))
}

// hint writes a line below the last column.
func (t table) hint(columns int, hint string) {
	if hint != "" {
		fmt.Fprintln(t, strings.Repeat("\t", columns-1)+"hint: "+plain(hint))
	}
}

func printChecks(out io.Writer, checks []doctor.Check) error {
	t := newTable(out)
	t.row("CHECK", "STATUS", "DETAIL")
	for _, c := range checks {
		t.row(c.Name, string(c.Status), c.Detail)
		t.hint(3, c.Hint)
	}
	return t.Flush()
}

func printEndpoints(out io.Writer, endpoints []*doctor.Endpoint) error {
	list := ""
	t := newTable(out)
	for _, e := range endpoints {
		if e.List != list {
			if err := t.Flush(); err != nil {
				return err
			}
			list = e.List
			fmt.Fprintf(out, "\n%s\n", plain(list))
			t.row("ENDPOINT", "STATUS", "TRANSPORT", "TOKEN", "LOGIN", "KEY", "ROUND TRIP", "SIGNATURE", "SESSIONS", "ALGORITHMS")
		}
		sessions := ""
		if e.Sessions > 0 {
			sessions = fmt.Sprint(e.Sessions)
		}
		key := string(e.Key)
		if e.UsableKeys > 0 {
			key = fmt.Sprintf("%d of %d signed", e.SignedKeys, e.UsableKeys)
		}
		t.row(e.Name, string(e.Status), string(e.Transport), e.Token, string(e.Login), key,
			e.RoundTrip.String(), e.Signature.String(), sessions, strings.ReplaceAll(doctor.Compact(e.Algorithms), "256/384/512", "*"))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, e := range endpoints {
		if e.Status == doctor.OK {
			continue
		}
		fmt.Fprintf(out, "\n%s:\n", plain(e.Name))
		for _, c := range e.Checks {
			if c.Status != doctor.OK {
				t.row(c.Name, string(c.Status), c.Detail)
				t.hint(3, c.Hint)
			}
		}
		if err := t.Flush(); err != nil {
			return err
		}
	}
	return nil
}

func printKeys(out io.Writer, keys []doctor.Key) error {
	if len(keys) == 0 {
		return nil
	}
	fmt.Fprintln(out)
	t := newTable(out)
	t.row("KEY", "STATUS", "TYPE", "KID", "DETAIL")
	for _, k := range keys {
		t.row(k.Name(), string(k.Status), string(k.Type), k.KeyID, k.Detail)
		t.hint(5, k.Hint)
	}
	return t.Flush()
}
