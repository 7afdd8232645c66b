"""A private Sigstore instance on this machine.

Its servers are in target/sigstore/bin (tests/sigstore/build): Fulcio, a certificate transparency log, a Rekor of version 2
and a timestamp authority. They keep everything in one folder, and their keys live as long as they do. Two more servers
are here: an OpenID issuer that signs any claims, and as much of a Rekor of version 1 as cosign's older form needs. A real
one needs Trillian and a database.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import pathlib
import socket
import subprocess
import threading
import time
import urllib.request

PROVENANCE = "https://slsa.dev/provenance/v1"
ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve()
os.environ["PATH"] = f"{TARGET}/sigstore/bin:{TARGET}/tools/bin:{os.environ['PATH']}:/usr/sbin:/sbin"
# Seconds until a server must answer.
PATIENCE = 60
HERE = "127.0.0.1"
CLIENT = "sigstore"
START = "2020-01-01T00:00:00Z"


def openssl(*arguments, data=b""):
    return subprocess.run(["openssl", *arguments], input=data, capture_output=True, check=True).stdout


def free_ports(count):
    probes = [socket.create_server((HERE, 0)) for _ in range(count)]
    ports = [str(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


class Server(http.server.ThreadingHTTPServer):
    """A server of this process, until the end of a `with` block."""

    def __init__(self, handler):
        super().__init__((HERE, 0), handler)
        self.url = f"http://{HERE}:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, value, status=200, **headers):
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_):
        pass


class Issuer(Server):
    """An OpenID issuer with a key in this folder."""

    def __init__(self, folder):
        super().__init__(IssuerHandler)
        self.key = str(folder / "issuer.key")
        openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", self.key)
        modulus = openssl("rsa", "-in", self.key, "-noout", "-modulus").decode().strip()
        self.modulus = bytes.fromhex(modulus.removeprefix("Modulus="))

    def token(self, claims):
        now = int(time.time())
        standard = {"iss": self.url, "aud": CLIENT, "iat": now, "nbf": now, "exp": now + 600}
        head = {"alg": "RS256", "kid": "only", "typ": "JWT"}
        text = ".".join(url_base64(canonical(part)) for part in (head, standard | claims))
        return f"{text}.{url_base64(openssl('dgst', '-sha256', '-sign', self.key, data=text.encode()))}"


class IssuerHandler(Handler):
    def do_GET(self):
        issuer = self.server
        key = {"kty": "RSA", "alg": "RS256", "use": "sig", "kid": "only", "e": "AQAB", "n": url_base64(issuer.modulus)}
        documents = {
            "/.well-known/openid-configuration": {
                "issuer": issuer.url,
                "jwks_uri": f"{issuer.url}/keys",
                "id_token_signing_alg_values_supported": ["RS256"],
                "response_types_supported": ["id_token"],
                "subject_types_supported": ["public"],
            },
            "/keys": {"keys": [key]},
        }
        self.answer(documents[self.path])


def url_base64(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class OlderLog(Server):
    """A log of version 1 whose tree has only the newest entry."""

    def __init__(self, folder):
        super().__init__(OlderLogHandler)
        self.key = str(folder / "older.key")
        self.id = hashlib.sha256(openssl("pkey", "-in", self.key, "-pubout", "-outform", "DER")).digest()

    def sign(self, data):
        return openssl("dgst", "-sha256", "-sign", self.key, data=data)

    def include(self, entry):
        """Returns the hash of an entry, and the entry with its proofs."""
        root = hashlib.sha256(b"\0" + entry).digest()
        note = f"{HERE} - 1\n1\n{base64_text(root)}\n"
        checkpoint = f"{note}\n\u2014 {HERE} {base64_text(self.id[:4] + self.sign(note.encode()))}\n"
        proof = {"checkpoint": checkpoint, "hashes": [], "logIndex": 0, "rootHash": root.hex(), "treeSize": 1}
        included = {"body": base64_text(entry), "integratedTime": int(time.time()), "logID": self.id.hex(), "logIndex": 0}
        promise = base64_text(self.sign(canonical(included)))
        return root.hex(), included | {"verification": {"signedEntryTimestamp": promise, "inclusionProof": proof}}


class OlderLogHandler(Handler):
    def do_POST(self):
        entry = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name, included = self.server.include(canonical(entry))
        self.answer({name: included}, 201, ETag=name, Location=f"/api/v1/log/entries/{name}")


def base64_text(data):
    return base64.b64encode(data).decode()


class Instance:
    """An instance, from its start to the end of a `with` block.

    Its folder has what a client needs: trusted_root.json, signing_config.json, and both in trust_config.json.
    """

    def __init__(self, folder, issuer):
        self.folder, self.issuer = folder, issuer
        self.servers = contextlib.ExitStack()

    def __enter__(self):
        self.folder.mkdir()
        with contextlib.ExitStack() as servers:
            self.servers = servers
            self.start_servers()
            self.write_trust()
            self.servers = servers.pop_all()
        return self

    def __exit__(self, *_):
        self.servers.close()

    def start(self, program, answers, *arguments):
        """Starts a server, waits until it answers at a URL, and returns the answer."""
        path = self.folder / f"{program}.log"
        with path.open("wb") as log:
            server = subprocess.Popen([program, *arguments], stdout=log, stderr=log, cwd=self.folder)
        self.servers.callback(server.wait)
        self.servers.callback(server.kill)
        end = time.monotonic() + PATIENCE
        while True:
            try:
                with urllib.request.urlopen(answers, timeout=5) as response:
                    return response.read().decode()
            except OSError as error:
                if server.poll() is not None or time.monotonic() > end:
                    text = path.read_text(errors="replace")[-4000:]
                    raise SystemExit(f"{program} does not answer ({error}):\n{text}") from error
            time.sleep(0.05)

    def start_servers(self):
        http, grpc, metrics, ct, log, log_grpc, log_metrics, tsa = free_ports(8)
        self.ca, self.ct = f"http://{HERE}:{http}", f"http://{HERE}:{ct}"
        self.log, self.tsa = f"http://{HERE}:{log}", f"http://{HERE}:{tsa}/api/v1/timestamp"
        issuer = {"IssuerURL": self.issuer.url, "ClientID": CLIENT, "Type": "github-workflow"}
        self.write("fulcio.json", json.dumps({"OIDCIssuers": {self.issuer.url: issuer}}))
        bundle = self.start(
            "fulcio", f"{self.ca}/api/v2/trustBundle", "serve", "--host", HERE, "--port", http, "--grpc-host", HERE,
            "--grpc-port", grpc, "--metrics-port", metrics, "--ca", "ephemeralca", "--ct-log-url", self.ct,
            "--config-path", "fulcio.json", "--legacy-unix-domain-socket", str(self.folder / "fulcio.sock"),
        )  # fmt: skip
        self.write("ca.pem", "\n".join(json.loads(bundle)["chains"][0]["certificates"]))
        self.make_key("ct", "ecparam", "-name", "prime256v1", "-genkey", "-noout")
        self.start(
            "tesseract", f"{self.ct}/ct/v1/get-roots", f"--http_endpoint={HERE}:{ct}", "--origin=ct.test",
            "--private_key=ct.key", "--roots_pem_file=ca.pem", "--storage_dir=ct", "--batch_max_age=50ms",
            "--checkpoint_interval=100ms",
        )  # fmt: skip
        self.make_key("log", "genpkey", "-algorithm", "ed25519")
        self.start(
            "rekor", f"{self.log}/healthz", "serve", "--http-port", log, "--grpc-port", log_grpc, "--http-metrics-port",
            log_metrics, "--hostname", HERE, "--storage-dir", str(self.folder / "log"), "--signer-filepath",
            "log.key", "--batch-max-age", "50ms", "--checkpoint-interval", "100ms",
        )  # fmt: skip
        self.make_key("older", "ecparam", "-name", "prime256v1", "-genkey", "-noout")
        self.older_log = self.servers.enter_context(OlderLog(self.folder)).url
        chain = self.start(
            "timestamp-server", f"{self.tsa}/certchain", "serve", "--host", HERE, "--port", tsa, "--timestamp-signer",
            "memory", "--disable-ntp-monitoring",
        )  # fmt: skip
        self.write("tsa.pem", chain)

    def make_key(self, name, *command):
        key, public = (str(self.folder / f"{name}.{kind}") for kind in ("key", "pub"))
        openssl(*command, "-out", key)
        openssl("pkey", "-in", key, "-pubout", "-out", public)

    def write_trust(self):
        cosign = ["cosign", "trusted-root", "create", "--out", "trusted_root.json"]
        since = f"start-time={START}"
        self.run(
            *cosign, "--fulcio", f"url={self.ca},certificate-chain=ca.pem", "--ctfe",
            f"url={self.ct},public-key=ct.pub,{since}", "--rekor",
            f"url={self.log},public-key=log.pub,{since},origin={HERE}", "--rekor",
            f"url={self.older_log},public-key=older.pub,{since}", "--tsa", f"url={self.tsa},certificate-chain=tsa.pem",
        )  # fmt: skip
        operator = f"{since},operator=test"
        self.run(
            "cosign", "signing-config", "create", "--out", "signing_config.json", "--fulcio",
            f"url={self.ca},api-version=1,{operator}", "--rekor", f"url={self.log},api-version=2,{operator}",
            "--rekor-config", "ANY", "--oidc-provider", f"url={self.issuer.url},api-version=1,{operator}", "--tsa",
            f"url={self.tsa},api-version=1,{operator}", "--tsa-config", "ANY",
        )  # fmt: skip
        root, signing = (json.loads((self.folder / f"{name}.json").read_text()) for name in ("trusted_root", "signing_config"))
        # sigstore-python wants a name, and Fulcio's own authority has none.
        root["certificateAuthorities"][0]["subject"]["commonName"] = "test"
        kind = "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json"
        trust = {"mediaType": kind, "trustedRoot": root, "signingConfig": signing}
        self.write("trust_config.json", json.dumps(trust))

    def write(self, name, text):
        (self.folder / name).write_text(text)

    def run(self, *command):
        """Runs a client in the folder, without the user's own settings."""
        environment = os.environ | {"HOME": str(self.folder), "DOCKER_CONFIG": str(self.folder)}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(map(str, command))}:\n{done.stdout.decode()}{done.stderr.decode()}")
        return done.stdout.decode()
