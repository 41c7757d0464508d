module github.com/hsmkey/hsmkey

go 1.26
