package main

import (
	"fmt"
	"os"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/internal/pkcs11uri"
	"github.com/hsmkey/hsmkey/sessionpool"
)

// tokenURI is the PKCS#11 URI of --uri or HSM_URI; the zero one says nothing.
type tokenURI struct {
	pkcs11uri.URI
	given bool
}

// readURI reads the flag or its variable. No error quotes it: it may hold a PIN.
func (g *globalFlags) readURI() (tokenURI, error) {
	text, name := g.uri, "--uri"
	if text == "" {
		text, name = os.Getenv(envURI), envURI
	}
	if text == "" {
		return tokenURI{}, nil
	}
	parsed, err := pkcs11uri.Parse(text)
	if err != nil {
		return tokenURI{}, withHint(fmt.Errorf("%w: %s: %w", hsmkey.ErrConfig, name, err),
			"a URI looks like pkcs11:token=demo?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/run/pin")
	}
	u := tokenURI{parsed, true}
	if unused := u.unused(); unused != "" {
		return tokenURI{}, withHint(fmt.Errorf("%w: %s has the attribute %s, which chooses nothing here and may not be ignored", hsmkey.ErrConfig, name, unused),
			"it may name the token (token, serial, slot-id), module-path and pin-source; name the key with --key or --id")
	}
	if g.uri != "" {
		err = u.besideFlags(g)
	}
	return u, err
}

// unused returns the name of an attribute that we do not choose by.
func (u tokenURI) unused() string {
	for _, a := range []struct {
		name    string
		present bool
	}{
		{"object", u.Object != ""},
		{"id", len(u.ID) > 0},
		{"type", u.Type != ""},
		{"manufacturer", u.Manufacturer != ""},
		{"model", u.Model != ""},
		{"library-manufacturer", u.LibraryManufacturer != ""},
		{"library-description", u.LibraryDescription != ""},
		{"library-version", u.LibraryVersion != ""},
		{"slot-manufacturer", u.SlotManufacturer != ""},
		{"slot-description", u.SlotDescription != ""},
		{"module-name", u.ModuleName != ""},
	} {
		if a.present {
			return a.name
		}
	}
	return ""
}

// selects reports whether the URI names a token.
func (u tokenURI) selects() bool { return u.Token != "" || u.Serial != "" || u.SlotID != nil }

// besideFlags refuses what a flag may not say, and what two flags say.
func (u tokenURI) besideFlags(g *globalFlags) error {
	switch {
	case u.PINValue != "":
		return withHint(usagef("--uri has a PIN in it, and everyone on this machine can read flags"),
			"use pin-source in the URI, --pin-file, or HSM_PIN_FILE")
	case g.balanceList != "":
		return usagef("--uri and --balance-list both say which HSM to use")
	case g.module != "" && u.ModulePath != "":
		return usagef("--uri and --module both name a library")
	case g.token != "" && u.selects():
		return usagef("--uri and --token both name a token")
	case g.pinFile != "" && u.PINSource != "":
		return usagef("--uri and --pin-file both name a file with the PIN")
	}
	return nil
}

// toEnvironment lets the URI take the place of the variables that say the same.
func (u tokenURI) toEnvironment() error {
	if !u.given {
		return nil
	}
	set := map[string]string{envBalanceList: ""}
	if u.ModulePath != "" {
		set[envModule] = u.ModulePath
	}
	if u.selects() {
		set[envToken] = u.Token
	}
	if u.PINSource != "" {
		set[envPINFile] = u.PINSource
		set[envPIN] = ""
	}
	if u.PINValue != "" {
		set[envPINFile] = ""
		set[envPIN] = u.PINValue
	}
	return setEnvironment(set)
}

// toPool says of the token what no variable can.
func (u tokenURI) toPool(pool *sessionpool.Config) {
	pool.TokenSerial = u.Serial
	pool.Slot = u.SlotID
}
