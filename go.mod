module github.com/hsmkey/hsmkey

go 1.26.0

require (
	github.com/go-jose/go-jose/v4 v4.1.8
	github.com/google/go-cmp v0.7.0
	github.com/letsencrypt/pkcs11key/v4 v4.0.1
	github.com/miekg/pkcs11 v1.1.2
	go.uber.org/goleak v1.3.0
)

require (
	github.com/ThalesGroup/crypto11 v1.6.2
	github.com/inconshreveable/mousetrap v1.1.0 // indirect
	github.com/pkg/errors v0.9.1 // indirect
	github.com/rogpeppe/go-internal v1.16.0
	github.com/spf13/cobra v1.10.2
	github.com/spf13/pflag v1.0.9
	github.com/thales-e-security/pool v0.0.2 // indirect
	golang.org/x/sys v0.49.0
	golang.org/x/term v0.47.0
	golang.org/x/tools v0.26.0 // indirect
)
