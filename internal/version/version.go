// Package version holds the one version string that every Margay binary prints.
package version

import (
	"runtime"
	"runtime/debug"
)

// version is set at build time by -ldflags "-X margay/internal/version.version=…"; a plain `go build` leaves "dev".
var version = "dev"

// String returns the version, and the VCS revision where the Go toolchain recorded one.
func String() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 12 {
				return version + "+" + s.Value[:12]
			}
		}
	}
	return version
}

// Line returns the line that `NAME --version` prints.
func Line(name string) string {
	return name + " " + String() + " (" + runtime.Version() + ")"
}
