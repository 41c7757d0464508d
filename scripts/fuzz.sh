#!/bin/sh
# fuzz.sh [DURATION]: runs every fuzz target of the module for DURATION (30s),
# one after the other, and stops at the first that fails.
set -eu
cd "$(dirname "$0")/.."
duration=${1:-30s}

list=$(mktemp)
trap 'rm -f "$list"' EXIT
# The names of a package's targets come first, then a line "ok <package> <time>".
go test -list '^Fuzz' ./... >"$list"
awk '/^Fuzz/ { names[++n] = $1 }
     $1 == "ok" { for (i = 1; i <= n; i++) print $2, names[i]; n = 0 }' "$list" |
  while read -r package target; do
    echo "fuzz: $target in $package for $duration"
    go test -run '^$' -fuzz "^$target\$" -fuzztime "$duration" "$package"
  done
