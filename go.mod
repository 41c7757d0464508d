module github.com/hsmkey/hsmkey

go 1.26

require (
	github.com/miekg/pkcs11 v1.1.2 // indirect
	go.uber.org/goleak v1.3.0 // indirect
)
