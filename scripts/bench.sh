#!/bin/sh
# bench.sh [GO TEST FLAGS...]: runs the benchmarks of the packages whose speed is
# a promise: the session pool's own cost, and signatures against the peers.
set -eu
cd "$(dirname "$0")/.."
exec go test -run '^$' -bench . -benchmem -timeout 60m "$@" ./sessionpool ./jws
