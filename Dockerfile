# syntax=docker/dockerfile:1

# The image of csi-driver-oci: only the binary, the libraries that it is linked to, and certificate authorities; no shell.
#
#   docker build -t registry.example.com/csi-driver-oci:0.1.0 .
#   docker buildx build --platform linux/amd64,linux/arm64 -t registry.example.com/csi-driver-oci:0.1.0 --push .
#
# It uses one base image, by tag. To pin it by digest, set --build-arg RUST_IMAGE=...@sha256:...
# Any image with Rust, a C compiler, glibc and certificate authorities works. The same base gives the same image. For the
# same file times too, set SOURCE_DATE_EPOCH, or the option of your builder (buildah: --timestamp).
ARG RUST_IMAGE=docker.io/library/rust:1.95-bookworm

FROM ${RUST_IMAGE} AS builder
WORKDIR /build
COPY Cargo.toml Cargo.lock build.rs ./
COPY proto proto
COPY crates crates
COPY src src
# The manifest names them; they are not built.
COPY benches benches
# Panics and debug information contain paths of the build; these are the same on every machine.
ENV RUSTFLAGS="--remap-path-prefix=/build=. --remap-path-prefix=/usr/local/cargo=cargo" \
    CARGO_INCREMENTAL=0
RUN cargo build --release --locked --bin csi-driver-oci
# Collects the files of the image at their paths: the libraries by the names that the loader uses.
RUN mkdir -p /image/usr/local/bin /image/etc/ssl/certs /image/run /image/tmp \
    && objcopy --strip-debug target/release/csi-driver-oci /image/usr/local/bin/csi-driver-oci \
    && cp /etc/ssl/certs/ca-certificates.crt /image/etc/ssl/certs/ \
    && ldd target/release/csi-driver-oci | grep -o '/[^ ]*' | xargs -I '{}' cp --dereference --parents '{}' /image

FROM scratch
LABEL org.opencontainers.image.title="csi-driver-oci" \
      org.opencontainers.image.description="A Kubernetes CSI driver that serves OCI artifacts as read-only pod volumes" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/csi-driver-oci/csi-driver-oci" \
      org.opencontainers.image.version="0.1.0"
COPY --from=builder /image /
# Mounting needs root, and the privileges in the DaemonSet. Other commands, such as check, run as any user.
USER 0:0
ENTRYPOINT ["/usr/local/bin/csi-driver-oci"]
CMD ["node"]
