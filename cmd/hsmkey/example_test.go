package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// eachCommand visits every command that a user can run or ask for help.
func eachCommand(cmd *cobra.Command, visit func(*cobra.Command)) {
	visit(cmd)
	for _, sub := range cmd.Commands() {
		if sub.Name() != "help" {
			eachCommand(sub, visit)
		}
	}
}

// shell runs lines of a shell, which have to work, and returns what they print.
func shell(t *testing.T, dir, lines string) string {
	t.Helper()
	cmd := exec.Command("bash", "-e", "-o", "pipefail", "-c", lines)
	cmd.Dir = dir
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s\n%s%s", err, lines, out, stderr.String())
	}
	return string(out)
}

func TestEveryExampleInTheHelpWorksAsPrinted(t *testing.T) {
	root := (&app{}).rootCommand(nil)
	eachCommand(root, func(cmd *cobra.Command) {
		t.Run(strings.ReplaceAll(cmd.CommandPath(), " ", "-"), func(t *testing.T) {
			if cmd.Example == "" || cmd.Long == "" && cmd.RunE == nil {
				t.Fatal("its help has no example")
			}
			dir := t.TempDir()
			if cmd != root {
				shell(t, dir, "hsmkey init")
			}
			if out := shell(t, dir, cmd.Example); out == "" && cmd.Name() != "completion" && cmd.Name() != "delete" {
				t.Error("it prints nothing")
			}
		})
	})
}

// One who pastes the examples of one help after the other into one directory
// gets no label that is taken.
func TestExamplesDoNotGetInEachOthersWay(t *testing.T) {
	dir := t.TempDir()
	eachCommand((&app{}).rootCommand(nil), func(cmd *cobra.Command) { shell(t, dir, cmd.Example) })
}

func TestTheCommandLinePageNamesEveryCommandAndFlag(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "..", "docs", "cli.md"))
	if err != nil {
		t.Fatal(err)
	}
	eachCommand((&app{}).rootCommand(nil), func(cmd *cobra.Command) {
		section := string(page)
		if cmd.HasParent() {
			_, after, found := strings.Cut(section, "\n## `"+cmd.CommandPath())
			if !found && cmd.RunE != nil && !cmd.HasSubCommands() {
				t.Errorf("docs/cli.md has no section on %s", cmd.CommandPath())
			}
			section, _, _ = strings.Cut(after, "\n## ")
		}
		checkFlags(t, cmd, section)
	})
}

func checkFlags(t *testing.T, cmd *cobra.Command, section string) {
	t.Helper()
	cmd.LocalNonPersistentFlags().VisitAll(func(flag *pflag.Flag) {
		if flag.Name != "help" && !strings.Contains(section, "`--"+flag.Name) {
			t.Errorf("docs/cli.md does not explain --%s of %s", flag.Name, cmd.CommandPath())
		}
	})
	if !cmd.HasParent() {
		cmd.PersistentFlags().VisitAll(func(flag *pflag.Flag) {
			if !strings.Contains(section, "`--"+flag.Name) {
				t.Errorf("docs/cli.md does not explain --%s", flag.Name)
			}
		})
	}
}
