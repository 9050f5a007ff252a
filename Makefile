# Margay's two commands are `make demo` and `make test`; both do all their own set-up. `make help` lists the rest.
SHELL       := /bin/bash
VERSION     ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS     := -s -w -X margay/internal/version.version=$(VERSION)
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
BINARIES    := vrouter margay-agent margay-cni margayctl
FUZZTIME    ?= 30s

export CGO_ENABLED = 0

.PHONY: help
help: ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.PHONY: setup
setup: ## install the system packages that the demo and the tests use (Debian, Ubuntu; root)
	@scripts/setup.sh

.PHONY: build
build: ## the four static binaries, in bin/
	@mkdir -p bin
	go build -trimpath -ldflags '$(LDFLAGS)' -o bin/ $(addprefix ./cmd/,$(BINARIES))

.PHONY: demo
demo: setup build ## a cluster of three nodes on this machine: what the system is for, in about a minute
	@scripts/demo.sh

.PHONY: test
test: setup build ## all tests: units, integration in network namespaces, a whole cluster
	go vet ./...
	go test -count=1 -timeout 15m $$(go list ./... | grep -v '^margay/test/')
	go test -run '^$$' -bench . -benchtime 1x ./bench/... ./vrouter/...
	go test -count=1 -timeout 20m -v ./test/...
	@$(MAKE) --no-print-directory test-attachments

# The rest of the matrix: what depends on how packets come and go, on every attachment and I/O but the default ones, and on
# several queues: ATTACHMENT:IO[:QUEUES[:THREADS]].
ATTACHMENTS := tun-plain:packet tun:packet tun:xdp:2:1 veth:packet:4:2 veth:xdp direct:packet:2 direct:xdp direct:tc:2
ATTACHTESTS := TestEveryPodReachesEveryPod|TestHostReachesRemotePodAndBack|TestUnderlayCarriesOnlyIPIP|TestMasquerade|TestDecapsulationIsNoOpenDoor|TestVRouterKilled|TestServices|TestAttachmentChanges
# And what a trace says of them, where packets go other ways than by the kernel's stack.
TRACED := veth:xdp direct:packet direct:tc
TRACETESTS := TestTraceKnowsPodsAndFilters|TestTraceNamesTheCarrier|TestTraceMasquerade|TestTraceAgreesWhereItOnceDidNot|TestTraceAgreesWithRandomPackets

.PHONY: test-attachments
test-attachments: build ## a part of the cluster's tests on each other attachment and I/O
	@set -e; for c in $(ATTACHMENTS); do \
		IFS=: read -r attach io queues threads <<<"$$c"; \
		echo "test/cluster with --attach $$attach --io $$io$${queues:+ --queues $$queues}$${threads:+ --threads-per-queue $$threads}"; \
		tests='$(ATTACHTESTS)'; case ' $(TRACED) ' in *" $$attach:$$io "*) tests="$$tests|$(TRACETESTS)" ;; esac; \
		MARGAY_TEST_ATTACH=$$attach MARGAY_TEST_IO=$$io MARGAY_TEST_QUEUES=$$queues MARGAY_TEST_THREADS=$$threads \
			go test -count=1 -timeout 10m -run "$$tests" ./test/cluster; \
	done

.PHONY: test-race
test-race: setup ## the race detector on daemons and tools, and on IPAM's simulation (needs a C compiler)
	CGO_ENABLED=1 go test -race -count=1 -timeout 20m $$(go list ./... | grep -vE '^margay/(test|bench)/')
	CGO_ENABLED=1 go test -race -count=1 -timeout 20m -run 'TestCrowdedCluster' ./bench/addr

.PHONY: bench bench-short
bench: setup ## Margay beside its peers, in network namespaces, into bench/results/: about fifteen minutes
	@go build -trimpath -ldflags '$(LDFLAGS)' -o bin/margay-bench ./bench/cmd/margay-bench
	@bin/margay-bench --results bench/results

bench-short: setup ## the same in about two minutes: fewer peers, scenarios and rounds
	@go build -trimpath -ldflags '$(LDFLAGS)' -o bin/margay-bench ./bench/cmd/margay-bench
	@bin/margay-bench --short --results bench/results

.PHONY: bench-rte-lpm
bench-rte-lpm: ## lookups beside DPDK's rte_lpm, which takes minutes to load (installs libdpdk-dev)
	@dpkg -s libdpdk-dev >/dev/null 2>&1 || apt-get install -y -q --no-install-recommends gcc pkg-config libdpdk-dev
	@go build -trimpath -ldflags '$(LDFLAGS)' -o bin/margay-bench ./bench/cmd/margay-bench
	@bin/margay-bench --scenario lookup --rte-lpm -o markdown

.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME (30s)
	@scripts/fuzz.sh $(FUZZTIME)

.PHONY: interop-kernel
interop-kernel: setup ## a real tunl0 as the other node: a Debian kernel in QEMU (a minute and a half; fetches 27 MB once)
	@scripts/interop-kernel.sh $(CURDIR)/bin/interop-kernel
	go vet -tags interop ./test/interop/...
	MARGAY_INTEROP_KERNEL=$(CURDIR)/bin/interop-kernel go test -tags interop -count=1 -v -timeout 5m ./test/interop

.PHONY: lint
lint: ## gofmt, go vet, staticcheck
	@test -z "$$(gofmt -l . | tee /dev/stderr)"
	go vet ./...
	go run $(STATICCHECK) ./...

.PHONY: proto
proto: ## regenerate the gRPC contract (protoc, protoc-gen-go v1.36.12, protoc-gen-go-grpc v1.6.2)
	cd vrouter/rpc/vrouterpb && protoc --go_out=. --go_opt=paths=source_relative \
		--go-grpc_out=. --go-grpc_opt=paths=source_relative vrouter.proto

.PHONY: clean
clean: ## what was built, and every lab
	-@test -x bin/margayctl && bin/margayctl lab down --all
	rm -rf bin
