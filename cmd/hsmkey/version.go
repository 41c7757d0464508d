package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is set by the linker (-X main.version=...).
var version string

// versionName is the version, or that of the module where the linker was not
// told.
func versionName() string {
	if version == "" {
		version = "devel"
		if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
			version = info.Main.Version
		}
	}
	return version
}

// commit is the revision that the program was built from.
func commit() string {
	revision, modified := "unknown", ""
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, setting := range info.Settings {
			switch {
			case setting.Key == "vcs.revision":
				revision = setting.Value
			case setting.Key == "vcs.modified" && setting.Value == "true":
				modified = ", modified"
			}
		}
	}
	return revision + modified
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print version, commit and Go version",
		Example: `  hsmkey version`,
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return a.printLine(fmt.Sprintf("hsmkey %s\ncommit %s\n%s %s/%s", versionName(), commit(), runtime.Version(), runtime.GOOS, runtime.GOARCH))
		},
	}
}
