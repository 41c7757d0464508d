# Targets for people who work on hsmkey; `make help` lists them.

SHELL := /bin/sh
.DEFAULT_GOAL := help

GO       ?= go
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
FUZZTIME ?= 30s
SOAK     ?= 10m

GOLANGCI_LINT_VERSION := v2.15.0
GOLANGCI_LINT         := .tools/golangci-lint-$(GOLANGCI_LINT_VERSION)

# Continuous integration trusts no cached result.
TESTFLAGS ?= $(if $(CI),-count=1)

.PHONY: help
help: ## Show this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  FUZZTIME=$(FUZZTIME) SOAK=$(SOAK) TESTFLAGS=$(TESTFLAGS)"

.PHONY: deps
deps: ## Install the programs that tests and the demo need, where they are missing
	@scripts/deps.sh

.PHONY: build
build: ## Build bin/hsmkey
	$(GO) build -trimpath -ldflags '-X main.version=$(VERSION)' -o bin/hsmkey ./cmd/hsmkey

.PHONY: demo
demo: deps build ## Sign JWTs with keys in a token, verify them with three programs
	@scripts/demo.sh

.PHONY: test
test: deps ## Run go vet and every test with the race detector (under six minutes)
	$(GO) vet ./...
	$(GO) test -race -timeout 6m $(TESTFLAGS) ./...

.PHONY: lint
lint: deps $(GOLANGCI_LINT) ## Run golangci-lint, installed into .tools/ on first use
	$(GOLANGCI_LINT) run ./...

# `go install` cannot name its output, so the version is put into the name here:
# another version is another file.
$(GOLANGCI_LINT):
	GOBIN='$(CURDIR)/.tools' $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_LINT_VERSION)
	mv .tools/golangci-lint $@

.PHONY: bench
bench: deps ## Run the benchmarks (BENCHFLAGS are passed to go test)
	@scripts/bench.sh $(BENCHFLAGS)

.PHONY: chaos
chaos: deps ## Kill, stop and restart HSMs under load, the long form
	HSMKEY_CHAOS=long $(GO) test -race -count=1 -timeout 60m -v -run Chaos ./balance ./cmd/hsmkey
	$(GO) test -run '^$$' -bench Acquire ./balance
	$(GO) test -run '^$$' -bench EndpointsAddUp -benchtime 5x ./balance

.PHONY: soak
soak: deps ## Run the session pool's randomised test for SOAK
	HSMKEY_SOAK=$(SOAK) $(GO) test -race -count=1 -timeout 0 -v -run Random ./sessionpool/...

.PHONY: fuzz
fuzz: deps ## Run each fuzz target for FUZZTIME
	@scripts/fuzz.sh $(FUZZTIME)

.PHONY: cover
cover: deps ## Measure test coverage, write coverage.html
	$(GO) test -timeout 10m -coverpkg=./... -coverprofile=coverage.out ./...
	$(GO) tool cover -html=coverage.out -o coverage.html
	@$(GO) tool cover -func=coverage.out | tail -n 1

.PHONY: clean
clean: ## Remove what was built (not .hsm/, which holds keys)
	rm -rf bin .tools coverage.out coverage.html
