package hsmkey

import (
	"encoding/binary"
	"testing"

	"github.com/miekg/pkcs11"
)

func TestAnUnsignedLongIsReadInBothOfItsSizes(t *testing.T) {
	four, eight := make([]byte, 4), make([]byte, 8)
	binary.NativeEndian.PutUint32(four, pkcs11.CKK_EC)
	binary.NativeEndian.PutUint64(eight, pkcs11.CKK_EC)
	for _, raw := range [][]byte{four, eight} {
		if got, ok := decodeUlong(raw); got != pkcs11.CKK_EC || !ok {
			t.Errorf("%x: %d, %v", raw, got, ok)
		}
	}
	for _, raw := range [][]byte{nil, {}, {3}, make([]byte, 5), make([]byte, 16)} {
		if got, ok := decodeUlong(raw); got != 0 || ok {
			t.Errorf("%x: %d, %v", raw, got, ok)
		}
	}
}
