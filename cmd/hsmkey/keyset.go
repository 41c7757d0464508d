package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/hsmkey/hsmkey"
	"github.com/hsmkey/hsmkey/jwk"
)

// readKeySet reads a JWK Set from a file or a URL.
func readKeySet(ctx context.Context, source string) (jwk.Set, error) {
	var data []byte
	var err error
	if strings.HasPrefix(source, "https://") || strings.HasPrefix(source, "http://") {
		data, err = fetch(ctx, source)
	} else {
		data, err = readFile("--jwks", source)
	}
	if err != nil {
		return jwk.Set{}, withHint(err, "a JWK Set can be given as a file, too")
	}
	set, err := jwk.ParseSet(data)
	if err != nil {
		return jwk.Set{}, withHint(fmt.Errorf("--jwks: %s: %w", source, err), "`hsmkey jwks` prints a JWK Set")
	}
	return set, nil
}

// fetchTimeout bounds the whole of a fetch.
const fetchTimeout = 10 * time.Second

// fetch gets a JWK Set from its issuer. Who can change it on the way can sign
// what we accept: so the way is encrypted, or does not leave the machine.
func fetch(ctx context.Context, address string) ([]byte, error) {
	location, err := url.Parse(address)
	if err != nil {
		return nil, fmt.Errorf("%w: --jwks is not a URL", hsmkey.ErrConfig)
	}
	if err := checkLocation(location); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: --jwks is not a URL", hsmkey.ErrConfig)
	}
	request.Header.Set("Accept", "application/jwk-set+json, application/json")
	client := &http.Client{CheckRedirect: func(next *http.Request, via []*http.Request) error {
		const most = 5
		if len(via) >= most {
			return fmt.Errorf("more than %d redirects", most)
		}
		return checkLocation(next.URL)
	}}
	response, err := client.Do(request)
	if err != nil {
		return nil, fetchError(location, err)
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers %s", location.Redacted(), response.Status)
	}
	data, err := readBounded(response.Body, location.Redacted(), maxInput)
	if err != nil {
		return nil, fetchError(location, err)
	}
	return data, nil
}

func checkLocation(location *url.URL) error {
	host := location.Hostname()
	loopback := host == "localhost" || net.ParseIP(host).IsLoopback()
	switch {
	case host == "":
		return fmt.Errorf("%w: --jwks is a URL without a host", hsmkey.ErrConfig)
	case location.Scheme == "https", location.Scheme == "http" && loopback:
		return nil
	}
	return withHint(fmt.Errorf("%w: keys are fetched by https, not from %s", hsmkey.ErrConfig, location.Redacted()),
		"http is for this machine only (localhost, 127.0.0.1, ::1); a file can be given, too")
}

func fetchError(location *url.URL, err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("no answer within %v", fetchTimeout)
	}
	if u := (*url.Error)(nil); errors.As(err, &u) {
		err = u.Err
	}
	return fmt.Errorf("fetching %s: %w", location.Redacted(), err)
}
