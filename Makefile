# Everything runs with a Rust toolchain on Debian 12 or 13; what else is needed comes with `make tools`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build
.PHONY: build demo test test-cluster test-cluster-long test-cluster-matrix test-sigstore cluster crash bench bench-models bench-preload lint check-release validate render fuzz site site-check tools

# For a longer fuzzing run: make fuzz SECONDS_PER_TARGET=600
SECONDS_PER_TARGET ?= 10
# For the long crash test: make crash ROUNDS=1000
ROUNDS ?= 200
# What `make test-cluster-long` upgrades from: the last release, or the commit before.
EARLIER_COMMIT ?= $(shell git describe --tags --abbrev=0 2>/dev/null || echo HEAD^)
# Arguments for `cargo test` and the benches: make test ARGUMENTS='--test e2e registration'
ARGUMENTS ?=
SIGSTORE_RECORDED := $(abspath $(or $(CARGO_TARGET_DIR),target))/sigstore/recorded
TOOLS := $(abspath $(or $(CARGO_TARGET_DIR),target))/tools

build:
	cargo build --release --locked

# A registry, a driver and a kubelet's calls, step by step, with times and bytes.
demo:
	scripts/demo

# Every test, with real mounts, in a mount namespace of its own.
test: tools
	@if [ "$$(id -u)" -ne 0 ]; then \
	    echo 'The tests mount ext4, xfs and btrfs and give files to several users, for which they need root:' >&2; \
	    echo '  sudo env PATH="$$PATH" make test' >&2; \
	    echo 'Without root: cargo test --workspace --lib' >&2; \
	    exit 1; \
	fi
	scripts/in-mount-namespace cargo test --workspace --locked --features fault-points $(ARGUMENTS)

# A Kubernetes of two nodes with the driver, and a shell in it. Built from pinned Go modules the first time.
cluster:
	scripts/cluster

# The tests on such a cluster: make test-cluster ARGUMENTS='volumes::'
# Of other versions: make test-cluster KUBERNETES=v1.36.3 CONTAINERD=v2.1.9 RUNTIME=v1.4.4, or RUNTIME=crun
test-cluster: tools
	scripts/cluster cargo test --workspace --locked --offline --features fault-points --test cluster -- $(ARGUMENTS)

# What takes minutes there, an upgrade from an earlier commit, and a cluster that is killed at random moments.
test-cluster-long: tools
	EARLIER_COMMIT=$(EARLIER_COMMIT) $(MAKE) test-cluster ARGUMENTS=--ignored
	eval "$$(scripts/install-test-tools --env)"; \
	    python3 tests/cluster/leftovers.py "$(dir $(TOOLS))debug/csi-driver-oci"

# The same tests on other versions: hours. ROWS='crun' selects rows of scripts/cluster-matrix.
test-cluster-matrix: tools
	scripts/cluster-matrix "$(ROWS)"

# Real clients sign at a private Sigstore instance, and the driver verifies that when the instance has ended.
test-sigstore: tools
	tests/sigstore/build
	python3 tests/sigstore/record.py "$(SIGSTORE_RECORDED)"
	SIGSTORE_RECORDED="$(SIGSTORE_RECORDED)" scripts/in-mount-namespace cargo test --workspace --locked \
	    --features fault-points --test e2e -- keyless::

# The driver is killed at random moments under load, so many times.
crash: tools
	CRASH_ROUNDS=$(ROUNDS) scripts/in-mount-namespace cargo test --workspace --locked --features fault-points \
	    --test e2e -- crash::kills

# Times, side by side, printed as tables: all of them, or make bench ARGUMENTS='publish memory'
bench: tools
	scripts/in-mount-namespace cargo bench --locked --bench side-by-side -- $(ARGUMENTS)

# Pods with 20 models of 1 GiB, cold and warm, beside `oras pull` in init containers: needs 40 GiB below /var/tmp, and nothing
# else running. Smaller: BENCH_MODELS=4 BENCH_MIB=64 BENCH_ROUNDS=1 make bench-models
bench-models: build tools
	eval "$$(scripts/install-test-tools --env)"; \
	    scripts/in-mount-namespace python3 benches/models.py "$(dir $(TOOLS))release/csi-driver-oci"

# The same preload controller before a real API server: time, requests, bytes and memory with 1,000 nodes and 50 preloads,
# or with BENCH_PRELOAD=nodes,preloads.
bench-preload: tools
	cargo bench --locked --bench side-by-side --no-run
	scripts/cluster --api-server cargo bench --locked --offline --bench side-by-side -- preload-api-server

lint:
	cargo fmt --all --check
	cargo clippy --workspace --locked --all-targets --test cluster --features fault-points -- -D warnings
	scripts/check-comments

# What a release needs that no build does: workflows, licences and sources of dependencies, the lock file of the fuzz
# targets, the chart's package, notes.
# In CI, scripts/check-dependencies also asks for known vulnerabilities.
check-release: tools
	scripts/check-workflows
	scripts/check-dependencies licenses bans sources
	cargo metadata --locked --format-version 1 --manifest-path fuzz/Cargo.toml >/dev/null
	scripts/release/chart "$(dir $(TOOLS))release-files"
	scripts/release/notes >/dev/null
	scripts/release/sbom aarch64-unknown-linux-musl >/dev/null

# Chart, manifests and examples against the schemas of Kubernetes, in seconds; `make test` does it too.
validate: tools
	PATH="$(TOOLS)/bin:$$PATH" "$(TOOLS)/python/bin/python" tests/cluster/check.py all

# deploy/base, the chart's README and the generated pages of docs anew, after a change of the chart, of a definition, of a
# flag, of an attribute or of a metric. As root, as `make test`.
render: tools
	deploy/render
	"$(TOOLS)/python/bin/python" tests/cluster/resources.py --write
	RENDER=1 cargo test --workspace --locked --features fault-points --lib cli::tests
	RENDER=1 scripts/in-mount-namespace cargo test --workspace --locked --features fault-points --test e2e \
	    -- documents::the_page_of_metrics

# Every fuzz target for a few seconds.
fuzz:
	scripts/fuzz $(SECONDS_PER_TARGET)

# The documentation as a site in target/book.
site:
	scripts/site

# Each page of the site in a headless browser, in light and dark: code, pictures, console. Screenshots are in target.
site-check:
	scripts/site-check

# Makes ready what tests and demo need, under target/tools; the system stays as it is.
tools:
	scripts/install-test-tools
