#!/bin/sh
# Installs the programs and libraries that the tests and the demo need, and only
# those that are missing. It looks for what a package provides, not for the
# package, so anything installed by other means counts. When nothing is missing
# it says nothing, needs no root and takes no time.
set -eu

# found FILE...: is one of these files there? Patterns are expanded by the caller.
found() {
  for file; do
    if [ -e "$file" ]; then return 0; fi
  done
  return 1
}

# library NAME: is this PKCS#11 library in a usual place? macOS calls some .dylib.
library() {
  library_file "$1" || library_file "${1%.so}.dylib"
}

library_file() {
  found /usr/lib/*/"$1" /usr/lib/*/pkcs11/"$1" /usr/lib/*/softhsm/"$1" /usr/lib/*/nss/"$1" \
    /usr/lib/softhsm/"$1" /usr/lib/pkcs11/"$1" /usr/lib/"$1" \
    /usr/lib64/softhsm/"$1" /usr/lib64/pkcs11/"$1" /usr/lib64/"$1" \
    /usr/local/lib/softhsm/"$1" /usr/local/lib/"$1" \
    /opt/homebrew/lib/softhsm/"$1" /opt/homebrew/lib/pkcs11/"$1" /opt/homebrew/lib/"$1"
}

have() { command -v "$1" >/dev/null 2>&1; }

jwcrypto() {
  python=/usr/bin/python3
  [ -x "$python" ] || return 1
  # Finding it is enough; importing it takes ten times as long.
  "$python" -I -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("jwcrypto") is None)'
}

# missing prints the Debian packages of all that is not there, one a line.
missing() {
  have softhsm2-util && library libsofthsm2.so || echo softhsm2
  have pkcs11-tool && library pkcs11-spy.so || echo opensc
  have p11-kit || echo p11-kit
  library p11-kit-client.so || echo p11-kit-modules
  have socat || echo socat
  have jose || echo jose
  jwcrypto || echo python3-jwcrypto
  have openssl || echo openssl
  library libsoftokn3.so || echo libnss3
  have certutil || echo libnss3-tools
  have gcc || have cc || echo gcc
  found /usr/include/stdlib.h /usr/include/*/stdlib.h || have xcrun || echo libc6-dev
}

PATH=$PATH:/usr/sbin:/usr/local/sbin
if ! have go; then
  echo "deps: Go 1.26 or newer is needed and not in PATH" >&2
  exit 1
fi
packages=$(missing | tr '\n' ' ')
packages=${packages% }
if [ -z "$packages" ]; then exit 0; fi

if ! have apt-get; then
  cat >&2 <<EOF
deps: missing (by their Debian names): $packages
Install them with your system's package manager, then try again:
  Fedora  dnf install softhsm opensc p11-kit p11-kit-server socat jose python3-jwcrypto openssl nss nss-tools gcc glibc-devel
  Alpine  apk add softhsm opensc p11-kit p11-kit-server socat jose py3-jwcrypto openssl nss nss-tools gcc musl-dev
  macOS   brew install softhsm opensc p11-kit socat jose openssl nss, and jwcrypto for /usr/bin/python3 with pip
EOF
  exit 1
fi

if [ "$(id -u)" = 0 ]; then
  root=
elif have sudo; then
  root=sudo
else
  echo "deps: missing: $packages. As root: apt-get install $packages" >&2
  exit 1
fi

echo "deps: installing $packages" >&2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# apt VERB...: quiet unless it fails; waits for another apt instead of failing.
apt() {
  if ! $root env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 "$@" >"$log" 2>&1 </dev/null; then
    cat "$log" >&2
    echo "deps: apt-get $1 failed. By hand, as root: apt-get install $packages" >&2
    exit 1
  fi
}
apt update
# Package names contain no spaces: splitting is what is wanted.
# shellcheck disable=SC2086
apt install --no-install-recommends $packages

packages=$(missing | tr '\n' ' ')
if [ -n "$packages" ]; then
  echo "deps: still missing after the installation: $packages" >&2
  exit 1
fi
