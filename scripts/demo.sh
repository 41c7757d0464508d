#!/bin/sh
# demo.sh: the main job from end to end. It makes a private token, generates keys
# in it, signs a JWT with each, and lets three programs verify them. Each line
# that begins with "$ " is the command that runs next, exactly as it can be typed
# in this directory. `make demo` installs and builds what it needs.
set -eu
cd "$(dirname "$0")/.."

# The demo's token and no other, whatever the environment points to.
# shellcheck disable=SC2046 # several names
unset SOFTHSM2_CONF $(env | sed -n 's/^\(HSM_[A-Z_]*\)=.*/\1/p')

say() { printf '\n# %s\n' "$*"; }

# run COMMAND: shows a command, then runs it in this shell.
run() {
  printf '$ %s\n' "$1"
  eval "$1"
}

# generate LABEL TYPE: makes a key unless the token has it from an earlier run.
generate() {
  if bin/hsmkey key list --json | grep -qF "\"label\":\"$1\""; then
    echo "The token already has the key $1: it is used again."
  else
    run "bin/hsmkey key generate $1 --type $2"
  fi
}

say "A private SoftHSM2 token under .hsm/, and the environment that points to it"
run 'eval "$(bin/hsmkey init)"'

say "An EC and an RSA key, generated in the token; no one can take them out"
generate demo-ec ec:P-256
generate demo-rsa rsa:2048
run 'bin/hsmkey key list'

say "The public keys, for those who verify"
run 'bin/hsmkey jwks demo-ec demo-rsa > .hsm/demo-jwks.json'
run 'cat .hsm/demo-jwks.json'

for key in demo-ec demo-rsa; do
  say "A JWT signed by $key, inside the token"
  run "TOKEN=\$(bin/hsmkey sign --key $key --claims '{\"sub\":\"alice\"}' --expires-in 1h)"
  run 'echo "$TOKEN"'

  say "Verified by hsmkey, with the public keys alone"
  run 'bin/hsmkey verify --jwks .hsm/demo-jwks.json "$TOKEN"'

  # José takes a line's end for a part of the signature, so it gets none; and of
  # a set it complains about each key that did not sign, so it gets the one.
  say "Verified by José"
  run "bin/hsmkey jwk $key > .hsm/$key.jwk"
  run "printf %s \"\$TOKEN\" | jose jws ver -i- -k .hsm/$key.jwk -O-"
  echo

  say "Verified by Python's jwcrypto"
  run "printf %s \"\$TOKEN\" | /usr/bin/python3 -c '
import sys
from jwcrypto import jwk, jwt
keys = jwk.JWKSet.from_json(open(\".hsm/demo-jwks.json\").read())
print(jwt.JWT(jwt=sys.stdin.read(), key=keys, algs=[\"ES256\", \"RS256\"]).claims)'"
done

say "Done: both tokens verify with hsmkey, José and jwcrypto."
