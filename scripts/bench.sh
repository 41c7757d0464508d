#!/bin/sh
# bench.sh [GO TEST FLAGS...]: compares ways to sign side by side with a bare loop
# in C (docs/performance.md), then runs the benchmarks of the packages whose speed
# is a promise. PEERFLAGS are for the comparison, such as "-rounds 5".
set -eu
cd "$(dirname "$0")/.."
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
${CC:-cc} -std=c99 -D_DEFAULT_SOURCE -O2 -o "$dir/bareloop" internal/bareloop/bareloop.c -ldl -pthread
go build -o "$dir/peers" ./internal/peers
# shellcheck disable=SC2086 # several flags
"$dir/peers" -bareloop "$dir/bareloop" ${PEERFLAGS:-}
go test -run '^$' -bench . -benchmem -timeout 60m "$@" ./sessionpool ./balance ./jws
go test -run '^$' -bench SignProcess -benchtime 300x ./cmd/hsmkey
go test -run '^$' -bench BatchMemory -benchtime 1x -timeout 60m ./cmd/hsmkey
