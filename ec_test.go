package hsmkey

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/asn1"
	"errors"
	"strings"
	"testing"
)

// publicKeys has one public key per curve, as a bare point.
func publicKeys(tb testing.TB) map[*curve][]byte {
	tb.Helper()
	points := map[*curve][]byte{}
	for _, c := range curves {
		if c.elliptic == nil {
			public, _, err := ed25519.GenerateKey(rand.Reader)
			if err != nil {
				tb.Fatal(err)
			}
			points[c] = public
			continue
		}
		key, err := ecdsa.GenerateKey(c.elliptic(), rand.Reader)
		if err != nil {
			tb.Fatal(err)
		}
		if points[c], err = point(&key.PublicKey); err != nil {
			tb.Fatal(err)
		}
	}
	return points
}

func TestAPointIsReadHoweverItIsWrapped(t *testing.T) {
	for c, bare := range publicKeys(t) {
		wrapped, err := wrapPoint(bare)
		if err != nil {
			t.Fatal(err)
		}
		bits, err := asn1.Marshal(asn1.BitString{Bytes: bare, BitLength: 8 * len(bare)})
		if err != nil {
			t.Fatal(err)
		}
		forms := map[string][]byte{
			"bare":         bare,
			"OCTET STRING": wrapped,
			"BIT STRING":   bits[max(0, len(bits)-len(bare)-maxPointHeader):],
			// The length in one byte although it is 128 or more.
			"short header": append([]byte{0x04, byte(len(bare))}, bare...),
		}
		if c.elliptic != nil {
			x, y := elliptic.Unmarshal(c.elliptic(), bare) //nolint:staticcheck // to make a compressed point
			forms["compressed"] = elliptic.MarshalCompressed(c.elliptic(), x, y)
		}
		for name, raw := range forms {
			public, err := c.parsePoint(raw)
			if err != nil {
				t.Errorf("%s, %s: %v", c.typ, name, err)
				continue
			}
			if got, err := point(public); err != nil || !bytes.Equal(got, bare) {
				t.Errorf("%s, %s: another point came out: %x, %v", c.typ, name, got, err)
			}
		}
	}
}

func TestWhatIsNoPointOfTheCurveIsRefused(t *testing.T) {
	for c, bare := range publicKeys(t) {
		off := bytes.Clone(bare)
		off[len(off)-1] ^= 1
		forms := map[string][]byte{
			"nothing":        {},
			"cut off":        bare[:len(bare)-1],
			"one byte more":  append(bytes.Clone(bare), 0),
			"another header": append([]byte{0x30, byte(len(bare))}, bare...),
			"a long header":  append([]byte{0x04, 0x83, 0, 0, byte(len(bare))}, bare...),
		}
		if c.elliptic != nil {
			forms["off the curve"] = off
			forms["infinity"] = make([]byte, len(bare))
		}
		for name, raw := range forms {
			if public, err := c.parsePoint(raw); !errors.Is(err, ErrUnsupported) {
				t.Errorf("%s, %s: %v, %v, want ErrUnsupported", c.typ, name, public, err)
			}
		}
	}
}

func TestACurveIsKnownByItsIdentifierAndEd25519ByItsName(t *testing.T) {
	for _, c := range curves {
		if got, err := parseCurve(c.params); got != c || err != nil {
			t.Errorf("%s: %v, %v", c.typ, got, err)
		}
	}
	name, err := asn1.MarshalWithParams("edwards25519", "printable")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := parseCurve(name); got != curveEd25519 || err != nil {
		t.Errorf("edwards25519: %v, %v", got, err)
	}
}

func TestAnUnknownCurveIsNamed(t *testing.T) {
	name, err := asn1.MarshalWithParams("edwards448", "printable")
	if err != nil {
		t.Fatal(err)
	}
	for want, params := range map[string][]byte{
		"1.3.132.0.10":             {0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x0a}, // secp256k1
		"edwards448":               name,
		"a curve that is not name": {0x30, 0x00},
		"that is not named":        nil,
		"is not named":             append(bytes.Clone(curveP256.params), 0),
	} {
		if _, err := parseCurve(params); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), want) {
			t.Errorf("%x: %v, want ErrUnsupported with %q", params, err, want)
		}
	}
}

func FuzzParsePoint(f *testing.F) {
	for c, bare := range publicKeys(f) {
		for i, known := range curves {
			if c == known {
				f.Add(i, bare)
				wrapped, err := wrapPoint(bare)
				if err != nil {
					f.Fatal(err)
				}
				f.Add(i, wrapped)
			}
		}
	}
	f.Fuzz(func(t *testing.T, which int, raw []byte) {
		if which < 0 || which >= len(curves) {
			return
		}
		c := curves[which]
		public, err := c.parsePoint(raw)
		if err != nil {
			if !errors.Is(err, ErrUnsupported) || public != nil {
				t.Errorf("parsePoint(%x) = %v, %v", raw, public, err)
			}
			return
		}
		bare, err := point(public)
		if err != nil {
			t.Fatal(err)
		}
		if c.elliptic != nil && len(raw) < 1+2*c.size {
			return // it was compressed
		}
		if !bytes.HasSuffix(raw, bare) {
			t.Errorf("parsePoint(%x) made up the point %x", raw, bare)
		}
		again, err := c.parsePoint(bare)
		if err != nil || !samePublic(again, public) {
			t.Errorf("the point of parsePoint(%x) does not come back: %v", raw, err)
		}
		if curveOf(public) != c {
			t.Errorf("parsePoint(%x) is on another curve", raw)
		}
	})
}

func FuzzParseCurve(f *testing.F) {
	for _, c := range curves {
		f.Add(c.params)
		if c.name != nil {
			f.Add(c.name)
		}
	}
	f.Add([]byte{0x30, 0x03, 0x02, 0x01, 0x01})
	f.Fuzz(func(t *testing.T, params []byte) {
		c, err := parseCurve(params)
		if (c == nil) == (err == nil) {
			t.Errorf("parseCurve(%x) = %v, %v", params, c, err)
		}
		if err != nil && !errors.Is(err, ErrUnsupported) {
			t.Errorf("parseCurve(%x) = %v, want ErrUnsupported", params, err)
		}
		if c != nil && !bytes.Equal(params, c.params) && !bytes.Equal(params, c.name) {
			t.Errorf("parseCurve(%x) took it for %s", params, c.typ)
		}
	})
}
