# syntax=docker/dockerfile:1

# The image of csi-driver-oci: the binary, the libraries that it is linked to, and TLS roots. Nothing else, no shell.
#
#   docker build -t registry.example.com/csi-driver-oci:0.1.0 .
#   docker buildx build --platform linux/amd64,linux/arm64 -t registry.example.com/csi-driver-oci:0.1.0 --push .
#
# One base image, by tag; pin it by the digest that your registry has: --build-arg RUST_IMAGE=...@sha256:...
# Any image will do that has Rust, a C compiler, glibc and certificate authorities. The same base gives the same image:
# for the same times in it too, SOURCE_DATE_EPOCH and what your builder has for it (buildah: --timestamp).
ARG RUST_IMAGE=docker.io/library/rust:1.95-bookworm

FROM ${RUST_IMAGE} AS builder
WORKDIR /build
COPY Cargo.toml Cargo.lock build.rs ./
COPY proto proto
COPY crates crates
COPY src src
# The manifest names them; they are not built.
COPY benches benches
# Paths of this machine end up in panics and debug information: the same ones everywhere.
ENV RUSTFLAGS="--remap-path-prefix=/build=. --remap-path-prefix=/usr/local/cargo=cargo" \
    CARGO_INCREMENTAL=0
RUN cargo build --release --locked --bin csi-driver-oci
# What goes into the image, at its place: the libraries by the names that the loader asks for.
RUN mkdir -p /image/usr/local/bin /image/etc/ssl/certs /image/run /image/tmp \
    && objcopy --strip-debug target/release/csi-driver-oci /image/usr/local/bin/csi-driver-oci \
    && cp /etc/ssl/certs/ca-certificates.crt /image/etc/ssl/certs/ \
    && ldd target/release/csi-driver-oci | grep -o '/[^ ]*' | xargs -I '{}' cp --dereference --parents '{}' /image

FROM scratch
LABEL org.opencontainers.image.title="csi-driver-oci" \
      org.opencontainers.image.description="A Kubernetes CSI driver that serves OCI artifacts as read-only pod volumes" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
COPY --from=builder /image /
# Mounting needs root; the DaemonSet says what else. Other commands, such as check, run as any user.
USER 0:0
ENTRYPOINT ["/usr/local/bin/csi-driver-oci"]
CMD ["node"]
