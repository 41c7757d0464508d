"""Verifies tokens with jwcrypto.

Reads a JSON list of {"name", "alg", "jwk", "token", "payload"} from standard
input, payload in base64url. Prints one line per token that does not verify to
exactly its payload, then the number of those that do.
"""
import json
import sys

from jwcrypto import jwk, jws
from jwcrypto.common import base64url_encode

verified = 0
for case in json.load(sys.stdin):
    try:
        token = jws.JWS()
        token.allowed_algs = [case["alg"]]
        token.deserialize(case["token"])
        token.verify(jwk.JWK.from_json(json.dumps(case["jwk"])))
        if base64url_encode(token.payload) != case["payload"]:
            raise ValueError("another payload")
        verified += 1
    except Exception as error:  # whatever it is, the token did not verify
        print(f"{case['name']}: {type(error).__name__}: {error}")
print(verified)
