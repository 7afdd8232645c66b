"""Registries, the cluster's DNS server, and a slow line to a registry."""

import asyncio
import hashlib
import io
import json
import pathlib
import shutil
import socket
import struct
import sys
import tarfile
import tempfile

from isolation import run, wait_until
from layout import (
    AUTHORITY, CONTROL_PLANE, NAMES, PASSWORD, PROGRAMS, REGISTRY, REGISTRY_WITH_USERS, RUN, SLOW_RATE,
    SLOW_REGISTRY, USER, node_address,
)  # fmt: skip

FOLDER = RUN / "registries"


def make_certificates():
    """An authority, and one certificate for all names and addresses of the registries."""
    FOLDER.mkdir(parents=True)
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30"]
    run("openssl", "req", "-x509", *key, "-keyout", FOLDER / "ca.key", "-out", AUTHORITY, "-subj", "/CN=cluster")
    names = ",".join(
        [f"DNS:{name}" for name in NAMES]
        + [f"IP:{address}" for address in (REGISTRY, REGISTRY_WITH_USERS, SLOW_REGISTRY)]
    )
    run(
        "openssl", "req", "-x509", *key, "-CA", AUTHORITY, "-CAkey", FOLDER / "ca.key", "-subj", "/CN=registries",
        "-addext", f"subjectAltName={names}", "-addext", "basicConstraints=critical,CA:FALSE",
        "-keyout", FOLDER / "server.key", "-out", FOLDER / "server.crt",
    )  # fmt: skip


def start(spawn):
    """Starts two registries with the same content, one of which has users, and what else is asked by address."""
    make_certificates()
    users = run("htpasswd", "-nbB", USER, PASSWORD)
    (FOLDER / "users").write_text(users)
    access = {"auth": {"htpasswd": {"realm": "private", "path": str(FOLDER / "users")}}}
    for name, address, more in (("registry", REGISTRY, {}), ("registry-with-users", REGISTRY_WITH_USERS, access)):
        configuration = {
            "version": "0.1",
            "log": {"level": "warn"},
            "storage": {"filesystem": {"rootdirectory": str(FOLDER / "content")}, "delete": {"enabled": True}},
            "http": {
                "addr": f"{address}:443",
                "tls": {"certificate": str(FOLDER / "server.crt"), "key": str(FOLDER / "server.key")},
            },
            **more,
        }
        file = FOLDER / f"{name}.json"
        # YAML is a superset of JSON.
        file.write_text(json.dumps(configuration))
        spawn(name, [PROGRAMS / "registry", "serve", file], OTEL_TRACES_EXPORTER="none")
    SLOW_RATE.write_text(str(1 << 20))
    wait_until("the registry", lambda: is_open(REGISTRY, 443))
    # It answers for names before it listens here.
    spawn("names", [sys.executable, pathlib.Path(__file__).parent, "serve"])
    wait_until("the names", lambda: is_open(SLOW_REGISTRY, 443))


def is_open(address, port):
    try:
        socket.create_connection((address, port), 1).close()
        return True
    except OSError:
        return False


def push_image(reference, files, entrypoint, command=(), user="0:0", labels=None):
    """Pushes an image of one layer; `files` is a folder, or bytes and modes by path."""
    with tempfile.TemporaryDirectory(dir=RUN) as folder:
        layout = pathlib.Path(folder)
        blobs = layout / "blobs/sha256"
        blobs.mkdir(parents=True)

        def blob(content, media_type):
            digest = hashlib.sha256(content).hexdigest()
            (blobs / digest).write_bytes(content)
            return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

        with tarfile.open(layout / "layer.tar", "w") as archive:
            if isinstance(files, pathlib.Path):
                archive.add(files, arcname=".", filter=as_root)
            else:
                for path, (content, mode) in files.items():
                    add_file(archive, path, content, mode)
        content = (layout / "layer.tar").read_bytes()
        (layout / "layer.tar").unlink()
        layer = blob(content, "application/vnd.oci.image.layer.v1.tar")
        configuration = {
            "architecture": run("dpkg", "--print-architecture").strip(),
            "os": "linux",
            "config": {
                "Entrypoint": list(entrypoint),
                "Cmd": list(command),
                "User": user,
                "Env": ["PATH=/bin:/usr/bin:/usr/local/bin"],
                "Labels": labels or {},
            },
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": blob(json.dumps(configuration).encode(), "application/vnd.oci.image.config.v1+json"),
            "layers": [layer],
        }
        index = {
            "schemaVersion": 2,
            "manifests": [blob(json.dumps(manifest).encode(), manifest["mediaType"])],
        }
        (layout / "index.json").write_text(json.dumps(index))
        (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        return run(PROGRAMS / "crane", "push", layout, reference).strip()


def as_root(entry):
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def add_file(archive, path, content, mode):
    entry = tarfile.TarInfo(path)
    entry.mode = mode
    if isinstance(content, str):
        entry.type, entry.linkname = tarfile.SYMTYPE, content
        archive.addfile(entry)
    elif content is None:
        entry.type = tarfile.DIRTYPE
        archive.addfile(entry)
    else:
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))


def busybox_files(program):
    """A root with busybox and a link for each of its commands."""
    commands = run(program, "--list").split()
    files = {
        "bin/busybox": (program.read_bytes(), 0o755),
        "tmp": (None, 0o1777),
        "etc/passwd": (b"root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n", 0o644),
        "etc/group": (b"root:x:0:\n", 0o644),
    }
    files.update({f"bin/{name}": ("busybox", 0o777) for name in commands if name != "busybox"})
    return files


def program_files(name):
    """One of the machine's programs, with its libraries at their places."""
    program = pathlib.Path(shutil.which(name))
    libraries = [pathlib.Path(word) for word in run("ldd", program).split() if word.startswith("/")]
    return {str(path)[1:]: (path.read_bytes(), 0o755) for path in [program, *libraries]}


async def serve():
    """Answers DNS and forwards slowly, until it is killed."""
    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(NameServer, local_addr=(CONTROL_PLANE, 53))
    server = await asyncio.start_server(forward, SLOW_REGISTRY, 443)
    await server.serve_forever()


class NameServer(asyncio.DatagramProtocol):
    """Answers questions for addresses of NAMES and of nodes; no other name exists."""

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, sender):
        labels, at = [], 12
        while data[at]:
            labels.append(data[at + 1 : at + 1 + data[at]].decode())
            at += 1 + data[at]
        kind = struct.unpack(">H", data[at + 1 : at + 3])[0]
        name = ".".join(labels).lower()
        address = NAMES.get(name)
        if name.startswith("node-") and name[5:].isdigit():
            address = node_address(name)
        answers = 1 if address and kind == 1 else 0
        # An answer of an authority, recursion available; code 3: there is no such name.
        header = data[:2] + struct.pack(">HHHHH", 0x8580 | (0 if address else 3), 1, answers, 0, 0)
        answer = b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 5, 4) + socket.inet_aton(address) if answers else b""
        self.transport.sendto(header + data[12 : at + 5] + answer, sender)


async def forward(reader, writer):
    """Forwards one connection to the registry, and its answers no faster than SLOW_RATE says."""
    upstream_reader, upstream_writer = await asyncio.open_connection(REGISTRY, 443)

    async def copy(source, target, limit):
        try:
            while data := await source.read(16384):
                target.write(data)
                await target.drain()
                if limit:
                    await asyncio.sleep(len(data) / max(1, int(SLOW_RATE.read_text() or 1)))
        except OSError:
            pass
        finally:
            target.close()

    await asyncio.gather(copy(reader, upstream_writer, False), copy(upstream_reader, writer, True))
