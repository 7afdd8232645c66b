# syntax=docker/dockerfile:1

# The image of csi-driver-oci: the binary, the C library and TLS roots; nothing else, no shell.
#
#   docker build -t csi-driver-oci:0.1.0 .
#   docker buildx build --platform linux/amd64,linux/arm64 -t REGISTRY/csi-driver-oci:0.1.0 --push .
#
# The base images are pinned by tag. Pin them by digest where you build: their digests are those of your registry.
ARG RUST_IMAGE=docker.io/library/rust:1.95-bookworm
ARG BASE_IMAGE=gcr.io/distroless/cc-debian12:latest

FROM ${RUST_IMAGE} AS builder
WORKDIR /build
COPY Cargo.toml Cargo.lock build.rs ./
COPY proto proto
COPY src src
# Paths of this machine end up in panics and debug information: the same ones everywhere.
ENV RUSTFLAGS="--remap-path-prefix=/build=. --remap-path-prefix=/usr/local/cargo=cargo" \
    CARGO_INCREMENTAL=0
RUN cargo build --release --locked --bin csi-driver-oci \
    && objcopy --strip-debug target/release/csi-driver-oci /csi-driver-oci

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="csi-driver-oci" \
      org.opencontainers.image.description="A Kubernetes CSI driver that serves OCI artifacts as read-only pod volumes" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
COPY --from=builder /csi-driver-oci /usr/local/bin/csi-driver-oci
# Mounting needs root; the DaemonSet says what else.
USER 0:0
ENTRYPOINT ["/usr/local/bin/csi-driver-oci"]
CMD ["node"]
