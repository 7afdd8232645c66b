"""The API server that scripts/test-api-server has built, with etcd, for as long as a `with` lasts."""

import base64
import json
import pathlib
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request


def token(name, *groups, **extra):
    """Whose it is, in the form that the server takes for signed."""
    user = {"name": name, "groups": groups, "extra": extra}
    return base64.urlsafe_b64encode(json.dumps(user).encode()).decode().rstrip("=")


NAMESPACE = "csi-driver-oci"
NODE_NAME = "authentication.kubernetes.io/node-name"


def account(name, **extra):
    """A token of a service account, as pods have it."""
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{NAMESPACE}"]
    return token(f"system:serviceaccount:{NAMESPACE}:{name}", *groups, **extra)


def of_node(name):
    """A token of the node plugin's pod on a node."""
    return account("csi-driver-oci", **{NODE_NAME: [name]})


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def wait_until(what, condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.1)


ADMINISTRATOR = token("admin", "system:masters")


class Server:
    def __init__(self, programs, driver, state):
        self.driver = driver
        self.state = pathlib.Path(state)
        self.processes = []
        etcd, peers, port = free_port(), free_port(), free_port()
        self.address = f"https://127.0.0.1:{port}"
        self.start(
            programs / "etcd",
            f"--data-dir={self.state}/etcd",
            f"--listen-client-urls=http://127.0.0.1:{etcd}",
            f"--advertise-client-urls=http://127.0.0.1:{etcd}",
            f"--listen-peer-urls=http://127.0.0.1:{peers}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{peers}",
            f"--initial-cluster=default=http://127.0.0.1:{peers}",
            "--unsafe-no-fsync",
        )
        self.start(
            programs / "api-server",
            f"--etcd=http://127.0.0.1:{etcd}",
            f"--port={port}",
            f"--certificates={self.state}",
        )
        self.authority = self.state / "apiserver.crt"
        wait_until("a certificate", self.authority.exists)
        self.trust = ssl.create_default_context(cafile=self.authority)
        wait_until("the API server", self.is_ready)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self, program, *arguments, **environment):
        """A process that ends with the server; its log is in the folder of the state."""
        with open(self.state / f"{len(self.processes)}-{pathlib.Path(program).name}.log", "w") as log:
            process = subprocess.Popen(
                [program, *arguments], stdout=log, stderr=log, env=environment or None
            )
        self.processes.append(process)

    def token_on(self, node):
        """A token of the node plugin's service account: of its pod on a node, or of no pod."""
        return of_node(node) if node else account("csi-driver-oci")

    def is_ready(self):
        try:
            return self.call("GET", "/readyz")[0] == 200
        except OSError:
            return False

    def call(self, method, path, body=None, token=ADMINISTRATOR, form="json"):
        """Status and answer of one request."""
        request = urllib.request.Request(
            self.address + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {token}", "Content-Type": f"application/{form}"},
        )
        try:
            with urllib.request.urlopen(request, context=self.trust, timeout=30) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, {"message": text.decode()}

    def place(self, document):
        """The path of an object; none of a kind that the server does not have."""
        version, metadata = document["apiVersion"], document["metadata"]
        folder = f"/apis/{version}" if "/" in version else f"/api/{version}"
        for resource in self.call("GET", folder)[1].get("resources", []):
            if resource["kind"] == document["kind"] and "/" not in resource["name"]:
                if resource["namespaced"]:
                    folder += f"/namespaces/{metadata.get('namespace', 'default')}"
                return f"{folder}/{resource['name']}/{metadata['name']}"
        return None

    def apply(self, document, token=ADMINISTRATOR, part="", dry_run=False):
        """Server-side apply, strictly; what is wrong with it, if anything is."""
        query = "?fieldManager=test&force=true&fieldValidation=Strict"
        query += "&dryRun=All" if dry_run else ""
        path = self.place(document) + part + query
        status, answer = self.call("PATCH", path, document, token, "apply-patch+yaml")
        return None if status in (200, 201) else answer["message"]

    def kubeconfig(self, name, token):
        """A file with which `token` comes in."""
        path = self.state / f"{name}.kubeconfig"
        cluster = {"server": self.address, "certificate-authority": str(self.authority)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }
        path.write_text(json.dumps(config))
        return path
