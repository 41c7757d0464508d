package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// notRun stands before a block of commands that the tests cannot run.
const notRun = "<!-- not run by the tests -->\n"

var shellBlock = regexp.MustCompile("(?s)(" + notRun + ")?```sh\n(.*?)```\n")

// command is a command of a page with the output that the page shows, in lines
// that begin with "# ".
type command struct{ line, output string }

// commandsOf returns the commands of all blocks of a page that are to be run.
func commandsOf(t *testing.T, page string) []command {
	t.Helper()
	content, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	var commands []command
	for _, block := range shellBlock.FindAllStringSubmatch(string(content), -1) {
		if block[1] != "" {
			continue
		}
		for line := range strings.Lines(block[2]) {
			if output, shown := strings.CutPrefix(line, "# "); shown {
				commands[len(commands)-1].output += output
			} else {
				commands = append(commands, command{line: line})
			}
		}
	}
	if len(commands) == 0 {
		t.Fatalf("%s has no commands", page)
	}
	return commands
}

// varying is what differs from run to run: thumbprints, ids and times.
var varying = regexp.MustCompile(`[-_A-Za-z0-9]{43}|\b[0-9a-f]{32}\b|\b1[0-9]{9}\b`)

func TestPagesShowCommandsThatWorkAndWhatTheyPrint(t *testing.T) {
	for _, page := range []string{"README.md", filepath.Join("docs", "getting-started.md")} {
		t.Run(page, func(t *testing.T) {
			commands := commandsOf(t, filepath.Join("..", "..", page))
			const end = "\x00"
			var script strings.Builder
			script.WriteString("exec 2>&1\n")
			for _, c := range commands {
				script.WriteString(c.line + "printf '\\0'\n")
			}
			shell := exec.Command("bash", "-e", "-c", script.String())
			shell.Dir = t.TempDir()
			out, err := shell.Output()
			outputs := strings.Split(string(out), end)
			if err != nil {
				t.Fatalf("%s%v: %s", commands[len(outputs)-1].line, err, outputs[len(outputs)-1])
			}
			for i, c := range commands {
				got, want := outputs[i], c.output
				if want == "" {
					continue
				}
				if !strings.HasSuffix(got, "\n") {
					got += "\n"
				}
				if varying.ReplaceAllString(got, "…") != varying.ReplaceAllString(want, "…") {
					t.Errorf("%sprints\n%sthe page shows\n%s", c.line, got, want)
				}
			}
		})
	}
}

func TestTheProgramOfTheREADMEIsTheExample(t *testing.T) {
	readme, err := os.ReadFile(filepath.Join("..", "..", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	example, err := os.ReadFile(filepath.Join("..", "..", "examples", "issue", "main.go"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(readme), "```go\n")
	program, _, found := strings.Cut(rest, "```\n")
	if !found || !strings.Contains(string(example), program) {
		t.Error("README.md shows Go that is not in examples/issue")
	}
}
