package jwk_test

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log"

	"github.com/hsmkey/hsmkey/jwk"
)

// rfc8037 is the public key of RFC 8037, appendix A.2.
func rfc8037() ed25519.PublicKey {
	x, err := base64.RawURLEncoding.DecodeString("11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo")
	if err != nil {
		log.Fatal(err)
	}
	return x
}

func ExampleFromPublic() {
	key, err := jwk.FromPublic(rfc8037())
	if err != nil {
		log.Fatal(err)
	}
	out, err := json.Marshal(key)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(out))
	// Output: {"use":"sig","kty":"OKP","kid":"kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k","crv":"Ed25519","alg":"EdDSA","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo","key_ops":["verify"]}
}

func ExampleParseSet() {
	set, err := jwk.ParseSet([]byte(`{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"2026-1","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"},{"kty":"new"}]}`))
	if err != nil {
		log.Fatal(err)
	}
	for _, key := range set.Keys() {
		fmt.Println(key.KeyID(), key.Algorithms())
	}

	_, err = jwk.ParseSet([]byte(`{"keys":[{"kty":"oct","k":"c2VjcmV0"}]}`))
	fmt.Println(errors.Is(err, jwk.ErrPrivate), err)
	// Output:
	// 2026-1 [EdDSA]
	// true private key where a public key is expected: the JWK has the member "k"; publish the public key only, and replace this key if it was public
}
