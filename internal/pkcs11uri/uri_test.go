package pkcs11uri

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
)

func mustParse(t *testing.T, text string) URI {
	t.Helper()
	u, err := Parse(text)
	if err != nil {
		t.Fatalf("Parse(%q): %v", text, err)
	}
	return u
}

func slot(n uint) *uint { return &n }

func TestEveryAttributeIsRead(t *testing.T) {
	got := mustParse(t, "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc.;"+
		"serial=0001;model=1.0;library-manufacturer=Oil;library-description=Soft%20Library;library-version=2.40;"+
		"object=my-certificate;type=cert;id=%69%95%3E%5C%F4%BD%EC%91;"+
		"slot-manufacturer=Slots;slot-description=Front%20slot;slot-id=4294967295"+
		"?pin-source=file:/etc/token&module-name=softhsm2&module-path=/usr/lib/softhsm/libsofthsm2.so")
	want := URI{
		Token: "The Software PKCS#11 Softtoken", Manufacturer: "Snake Oil, Inc.", Serial: "0001", Model: "1.0",
		LibraryManufacturer: "Oil", LibraryDescription: "Soft Library", LibraryVersion: "2.40",
		Object: "my-certificate", Type: "cert", ID: []byte{0x69, 0x95, 0x3e, 0x5c, 0xf4, 0xbd, 0xec, 0x91},
		SlotManufacturer: "Slots", SlotDescription: "Front slot", SlotID: slot(4294967295),
		PINSource: "/etc/token", ModuleName: "softhsm2", ModulePath: "/usr/lib/softhsm/libsofthsm2.so",
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestAnEmptyURIMatchesEverything(t *testing.T) {
	for _, text := range []string{"pkcs11:", "pkcs11:?", "PKCS11:"} {
		if got := mustParse(t, text); !reflect.DeepEqual(got, URI{}) {
			t.Errorf("Parse(%q) = %+v", text, got)
		}
	}
}

func TestValuesArePercentDecodedAndNothingElse(t *testing.T) {
	u := mustParse(t, "pkcs11:object=a+b%2Bc%20d;id=0123;token=%c3%a4?pin-value=+%26")
	if u.Object != "a+b+c d" {
		t.Errorf("object = %q: a plus sign must stay one", u.Object)
	}
	if string(u.ID) != "0123" {
		t.Errorf("id = %x: four characters must stay four bytes", u.ID)
	}
	if u.Token != "ä" {
		t.Errorf("token = %q", u.Token)
	}
	if u.PINValue != "+&" {
		t.Errorf("pin-value = %q", u.PINValue)
	}
	if u := mustParse(t, "pkcs11:object=a%2541"); u.Object != "a%41" {
		t.Errorf("object = %q: decoded twice", u.Object)
	}
}

func TestAttributeNamesHaveNoCase(t *testing.T) {
	u := mustParse(t, "pkcs11:Token=a;TYPE=Private?PIN-Value=1234")
	if u.Token != "a" || u.Type != "private" || u.PINValue != "1234" {
		t.Errorf("got %+v, PIN of %d bytes", u, len(u.PINValue))
	}
}

func TestPINSourceIsAFile(t *testing.T) {
	for source, want := range map[string]string{
		"/run/pin":                 "/run/pin",
		"file:/run/pin":            "/run/pin",
		"file:///run/pin":          "/run/pin",
		"file://localhost/run/pin": "/run/pin",
		"FILE:/run/pin":            "/run/pin",
		"file:/run/my%20pin":       "/run/my pin",
	} {
		if u := mustParse(t, "pkcs11:?pin-source="+source); u.PINSource != want {
			t.Errorf("pin-source=%s: got %q, want %q", source, u.PINSource, want)
		}
	}
}

func TestVendorAttributesOfTheQueryAreDropped(t *testing.T) {
	u := mustParse(t, "pkcs11:token=a?acme-rack=4&x-acme=1&x-acme=2&acme_2=")
	if want := (URI{Token: "a"}); !reflect.DeepEqual(u, want) {
		t.Errorf("got %+v", u)
	}
}

func TestBadURIsAreRefusedWithAttributeAndOffset(t *testing.T) {
	for _, test := range []struct {
		uri, attribute string
		offset         int
	}{
		{"", "", 0},
		{"pkcs11", "", 0},
		{"http://example.com", "", 0},
		{" pkcs11:token=a", "", 0},
		{"pkcs11:token", "", 7},
		{"pkcs11:=a", "", 7},
		{"pkcs11:tok%65n=a", "", 7},
		{"pkcs11:to\u212aen=a", "", 7},
		{"pkcs11:token=a;", "", 15},
		{"pkcs11:token=a;;id=b", "", 15},
		{"pkcs11:tokn=a", "", 7},
		{"pkcs11:x-acme=a", "", 7},
		{"pkcs11:token=a;token=b", "token", 15},
		{"pkcs11:token=a;Token=b", "token", 15},
		{"pkcs11:token=", "token", 7},
		{"pkcs11:id=", "id", 7},
		{"pkcs11:token=a b", "token", 14},
		{"pkcs11:token=a#b", "token", 14},
		{"pkcs11:token=a/b", "token", 14},
		{"pkcs11:token=ä", "token", 13},
		{"pkcs11:token=a%", "token", 14},
		{"pkcs11:token=a%4", "token", 14},
		{"pkcs11:token=a%4g", "token", 14},
		{"pkcs11:token=a%+4", "token", 14},
		{"pkcs11:token=%ff", "token", 7},
		{"pkcs11:token=a%00", "token", 7},
		{"pkcs11:object=a;type=key", "type", 16},
		{"pkcs11:slot-id=-1", "slot-id", 7},
		{"pkcs11:slot-id=0x1", "slot-id", 7},
		{"pkcs11:slot-id=18446744073709551616", "slot-id", 7},
		{"pkcs11:library-version=2.", "library-version", 7},
		{"pkcs11:library-version=.2", "library-version", 7},
		{"pkcs11:library-version=2.40.1", "library-version", 7},
		{"pkcs11:library-version=2.256", "library-version", 7},
		{"pkcs11:pin-value=1234", "pin-value", 7},
		{"pkcs11:module-path=x", "module-path", 7},
		{"pkcs11:?token=a", "token", 8},
		{"pkcs11:?&", "", 8},
		{"pkcs11:?acme=a#", "", 14},
		{"pkcs11:?ac me=a", "", 8},
		{"pkcs11:?pin-sorce=/run/pin", "", 8},
		{"pkcs11:?module-pth=/lib/a.so", "", 8},
		{"pkcs11:?pin-value=", "pin-value", 8},
		{"pkcs11:?pin-value=1&pin-value=1", "pin-value", 20},
		{"pkcs11:?pin-value=1&pin-source=/run/pin", "pin-source", 8},
		{"pkcs11:?module-path=lib/a.so", "module-path", 8},
		{"pkcs11:?pin-source=|/bin/pin", "pin-source", 8},
		{"pkcs11:?pin-source=pin", "pin-source", 8},
		{"pkcs11:?pin-source=file:pin", "pin-source", 8},
		{"pkcs11:?pin-source=file://host/pin", "pin-source", 8},
		{"pkcs11:?pin-source=http://host/pin", "pin-source", 8},
	} {
		u, err := Parse(test.uri)
		var bad *Error
		if !errors.As(err, &bad) {
			t.Errorf("Parse(%q) = %v, %v; want an *Error", test.uri, u, err)
			continue
		}
		if bad.Attribute != test.attribute || bad.Offset != test.offset {
			t.Errorf("Parse(%q): %v; want attribute %q at offset %d", test.uri, err, test.attribute, test.offset)
		}
		if !reflect.DeepEqual(u, URI{}) {
			t.Errorf("Parse(%q) left %v behind", test.uri, u)
		}
	}
}

func TestAttributesWithoutAMeaningAreRefused(t *testing.T) {
	if u, err := ParseOnly("pkcs11:token=a?module-path=/lib/a.so&acme=1", "token", "module-path"); err != nil || u.Token != "a" {
		t.Errorf("got %v, %v", u, err)
	}
	for text, want := range map[string]Error{
		"pkcs11:token=a;Object=b":           {Attribute: "object", Offset: 15},
		"pkcs11:token=a?pin-value=s3cret":   {Attribute: "pin-value", Offset: 15},
		"pkcs11:slot-id=1?module-path=/lib": {Attribute: "slot-id", Offset: 7},
	} {
		_, err := ParseOnly(text, "token", "module-path")
		var bad *Error
		if !errors.As(err, &bad) || bad.Attribute != want.Attribute || bad.Offset != want.Offset {
			t.Errorf("ParseOnly(%q): %v; want attribute %q at offset %d", text, err, want.Attribute, want.Offset)
		}
	}
}

func TestNoTextOfAURIHoldsThePIN(t *testing.T) {
	u := mustParse(t, "pkcs11:token=a?pin-value=s3cret&module-path=/lib/a.so")
	asJSON, err := json.Marshal(u)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{
		u.String(), string(asJSON),
		fmt.Sprintf("%v %+v %#v %s %q", u, u, u, u, u),
		fmt.Sprintf("%v %+v %#v", &u, &u, &u),
		fmt.Sprintf("%+v %#v", []URI{u}, struct{ U URI }{u}),
	} {
		if strings.Contains(text, "s3cret") {
			t.Errorf("PIN in %q", text)
		}
	}
	if want := "pkcs11:token=a?module-path=/lib/a.so"; u.String() != want {
		t.Errorf("String() = %q, want %q", u, want)
	}
}

func TestNoErrorHoldsThePIN(t *testing.T) {
	for _, text := range []string{
		"pkcs11:token=a;pin-value=s3cret",
		"pkcs11:token=a;PIN-VALUE=s3cret",
		"pkcs11:?pin-value=s3cret#",
		"pkcs11:?pin-value=s3cret%zz",
		"pkcs11:?pin-value=s3cret%ff",
		"pkcs11:?pin-value=a&s3cret",
		"pkcs11:?pin-value=a&pin-s3cret=",
		"pkcs11:?pin-value=s3cret&pin-source=/s3cret",
		"pkcs11:?pin-source=s3cret",
		"pkcs11:s3cret=1",
		"pkcs11:pin_value=s3cret",
		"s3cret",
	} {
		_, err := Parse(text)
		if err == nil {
			t.Errorf("Parse(%q) succeeds", text)
		} else if strings.Contains(err.Error(), "s3cret") {
			t.Errorf("PIN in %q", err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("pkcs11:token=a%20b;object=c;type=private;id=%00%ff;slot-id=7?pin-source=file:/run/pin&module-path=/lib/a.so")
	f.Add("pkcs11:library-version=2.40;library-manufacturer=+?pin-value=1%26;&x-acme=|")
	f.Add("pkcs11:?pin-source=file:////run//pin")
	f.Add("pkcs11:?pin-source=%7C")
	f.Fuzz(func(t *testing.T, text string) {
		u, err := Parse(text)
		if err != nil {
			var bad *Error
			if !errors.As(err, &bad) || bad.Offset < 0 || bad.Offset > len(text) {
				t.Fatalf("Parse(%q): %#v", text, err)
			}
			return
		}
		again, err := Parse(u.String())
		if err != nil {
			t.Fatalf("Parse(%q).String() = %q: %v", text, u, err)
		}
		u.PINValue = ""
		if !reflect.DeepEqual(u, again) {
			t.Fatalf("Parse(%q) = %q, read again: %q", text, u, again)
		}
	})
}

// FuzzPINInErrors surrounds a PIN with garbage on both sides.
func FuzzPINInErrors(f *testing.F) {
	const pin = "S3cr3t-PIN_0123456789"
	f.Add("pkcs11:token=a?pin-value=", "&module-path=x")
	f.Add("pkcs11:token=a;pin-value=", "")
	f.Add("pkcs11:token=a?pin-", "=1")
	f.Add("", "")
	f.Fuzz(func(t *testing.T, before, after string) {
		_, err := Parse(before + pin + after)
		if err != nil && strings.Contains(strings.ToLower(err.Error()), strings.ToLower(pin)) {
			t.Fatalf("PIN in the error for %q + PIN + %q: %v", before, after, err)
		}
	})
}
