package jws_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/hsmkey/hsmkey/jws"
)

func TestClaimsAreAnyJSONObject(t *testing.T) {
	type own struct {
		jwt.Claims
		Admin bool `json:"admin,omitempty"`
	}
	expiry := jwt.NewNumericDate(time.Unix(1300819380, 0))
	for name, test := range map[string]struct {
		claims any
		want   string
	}{
		"a map":               {map[string]any{"sub": "joe", "n": 1}, `{"n":1,"sub":"joe"}`},
		"an empty map":        {map[string]any{}, `{}`},
		"go-jose's claims":    {jwt.Claims{Issuer: "joe", Audience: jwt.Audience{"a"}, Expiry: expiry}, `{"iss":"joe","aud":"a","exp":1300819380}`},
		"an embedding struct": {&own{Claims: jwt.Claims{Issuer: "joe"}, Admin: true}, `{"iss":"joe","admin":true}`},
		"raw JSON":            {json.RawMessage(" {\"b\": 1,\r\n \"a\":2}\n"), " {\"b\": 1,\r\n \"a\":2}\n"},
		"bytes":               {[]byte(`{"a":"\u0062"}`), `{"a":"\u0062"}`},
		"nested duplicates":   {[]byte(`{"a":{"b":1,"b":2},"b":[{"a":1},{"a":1}]}`), `{"a":{"b":1,"b":2},"b":[{"a":1},{"a":1}]}`},
		"names in values":     {[]byte(`{"a":"a","b":["a","b"],"c":"\"a\":"}`), `{"a":"a","b":["a","b"],"c":"\"a\":"}`},
		"escaped quotes":      {[]byte(`{"x":"\",\"a\":1,\"b\":2,"}`), `{"x":"\",\"a\":1,\"b\":2,"}`},
		"names by case":       {[]byte(`{"sub":1,"SUB":2}`), `{"sub":1,"SUB":2}`},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := jws.MarshalClaims(test.claims)
			if err != nil || string(got) != test.want {
				t.Errorf("MarshalClaims = %s, %v, want %s", got, err, test.want)
			}
		})
	}
}

func TestWhatIsNoClaimsSetIsRefusedByName(t *testing.T) {
	many := func(last string) string {
		var b strings.Builder
		for i := range 100 {
			fmt.Fprintf(&b, `"claim %d":%d,`, i, i)
		}
		return "{" + b.String() + `"` + last + `":0}`
	}
	if _, err := jws.MarshalClaims([]byte(many("claim 100"))); err != nil {
		t.Errorf("many claims: %v", err)
	}
	for name, test := range map[string]struct {
		claims any
		want   string
	}{
		"nil":                  {nil, "null"},
		"a nil pointer":        {(*jwt.Claims)(nil), "null"},
		"a nil map":            {map[string]any(nil), "null"},
		"a string":             {`{"sub":"joe"}`, "string"},
		"a number":             {7, "number"},
		"a boolean":            {true, "boolean"},
		"a slice":              {[]string{"a"}, "array"},
		"an array in JSON":     {json.RawMessage(` [1]`), "array"},
		"a number in JSON":     {[]byte(`-1`), "number"},
		"a channel":            {make(chan int), "chan int"},
		"nothing":              {[]byte(nil), "empty"},
		"blanks":               {[]byte(" \n"), "empty"},
		"a broken object":      {[]byte(`{"a":1`), "not JSON"},
		"two objects":          {[]byte(`{"a":1}{"b":2}`), "byte 8"},
		"a single quote":       {[]byte(`{'a':1}`), "byte 2"},
		"a byte order mark":    {[]byte("\uFEFF{}"), "byte order mark"},
		"UTF-16":               {[]byte("{\x00\"\x00a\x00"), "not JSON"},
		"bad UTF-8":            {[]byte("{\"a\":\"\xff\"}"), "UTF-8"},
		"deep nesting":         {[]byte(strings.Repeat(`{"a":`, 20000) + "1" + strings.Repeat("}", 20000)), "not JSON"},
		"a claim twice":        {[]byte(`{"sub":"a","x":{},"sub":"b"}`), `"sub"`},
		"twice, once escaped":  {[]byte(`{"sub":"a","s\u0075b":"b"}`), `"sub"`},
		"the last of many":     {[]byte(many("claim 99")), `"claim 99"`},
		"the first of many":    {[]byte(many("claim 0")), `"claim 0"`},
		"an empty name, twice": {[]byte(`{"":1,"":2}`), `""`},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := jws.MarshalClaims(test.claims)
			if !errors.Is(err, jws.ErrClaims) || out != nil {
				t.Fatalf("MarshalClaims = %.40s, %v, want ErrClaims", out, err)
			}
			if !strings.Contains(err.Error(), test.want) {
				t.Errorf("the error says %q, it should name %s", err, test.want)
			}
		})
	}
}

// FuzzClaims compares the check of claims with the standard library's decoder.
func FuzzClaims(f *testing.F) {
	for _, seed := range []string{
		`{}`, `{"a":1,"a":2}`, `{"a":{"b":1},"b":[{"a":1}]}`, `{"s\u0075b":1,"sub":2}`, ` {"":"","\\":"\\\"","\"":1} `,
		`[]`, `"{"`, `null`, "{\"a\":\"\xff\"}", `{"a":1}{}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		out, err := jws.MarshalClaims(data)
		if err != nil && !errors.Is(err, jws.ErrClaims) {
			t.Fatalf("an error that is not ErrClaims: %v", err)
		}
		if got, want := err == nil, isClaimsSet(data); got != want {
			t.Fatalf("accepted is %v (%v), want %v", got, err, want)
		}
		if err == nil && string(out) != string(data) {
			t.Fatalf("signed as %q", out)
		}
	})
}

// isClaimsSet says by other means whether data is one JSON object in UTF-8 that
// names no claim twice.
func isClaimsSet(data []byte) bool {
	decoder := json.NewDecoder(strings.NewReader(string(data)))
	if !json.Valid(data) || strings.ToValidUTF8(string(data), "") != string(data) {
		return false
	}
	if first, err := decoder.Token(); err != nil || first != json.Delim('{') {
		return false
	}
	names := make(map[string]bool)
	for decoder.More() {
		token, err := decoder.Token()
		name, ok := token.(string)
		if err != nil || !ok || names[name] {
			return false
		}
		names[name] = true
		var value json.RawMessage
		if err := decoder.Decode(&value); err != nil {
			return false
		}
	}
	return true
}
