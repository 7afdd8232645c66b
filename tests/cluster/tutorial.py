"""What docs/tutorial.md needs of a cluster, beside the controller and the node plugins, which are real.

    tutorial.py serve HOST:PORT    an API server for kubectl, in front of that of the preloads; prints its port. Plays
                                   Crossplane with the real Compositions, and the controller of StatefulSets
    tutorial.py helm ARGUMENTS...  helm install: renders the chart by Helm's engine, and applies it by kubectl
    tutorial.py go ARGUMENTS...    go build: writes programs into the folder of -o

A post-receive hook of the Git repository plays Argo CD: see tests/e2e/tutorial.rs, which also plays the kubelets. They
read /play/pods and write /play/ready/NAME.
"""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
import uuid
from http.server import ThreadingHTTPServer

import yaml

import chart
import compose
from api_handler import ApiHandler, merge

NODES = ["one", "two"]
# Group and version, kind, plural, whether it has namespaces.
KINDS = [
    ("v1", "Namespace", "namespaces", False),
    ("v1", "Node", "nodes", False),
    ("v1", "Pod", "pods", True),
    ("v1", "Secret", "secrets", True),
    ("v1", "ConfigMap", "configmaps", True),
    ("v1", "Service", "services", True),
    ("v1", "ServiceAccount", "serviceaccounts", True),
    ("apps/v1", "StatefulSet", "statefulsets", True),
    ("apps/v1", "DaemonSet", "daemonsets", True),
    ("apps/v1", "Deployment", "deployments", True),
    ("batch/v1", "Job", "jobs", True),
    ("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets", True),
    ("storage.k8s.io/v1", "CSIDriver", "csidrivers", False),
    ("rbac.authorization.k8s.io/v1", "Role", "roles", True),
    ("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings", True),
    ("rbac.authorization.k8s.io/v1", "ClusterRole", "clusterroles", False),
    ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", "clusterrolebindings", False),
    ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy", "validatingadmissionpolicies", False),
    ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicyBinding", "validatingadmissionpolicybindings", False),
    ("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions", False),
    ("apiextensions.crossplane.io/v1", "Composition", "compositions", False),
    ("apiextensions.crossplane.io/v2", "CompositeResourceDefinition", "compositeresourcedefinitions", False),
    ("pkg.crossplane.io/v1", "Function", "functions", False),
    ("argoproj.io/v1alpha1", "Application", "applications", True),
    ("custom.prometheus.io/v1alpha1", "CustomPrometheus", "customprometheuses", True),
    ("oci.custom.io/v1alpha1", "ArtifactPreload", "artifactpreloads", True),
    ("oci.custom.io/v1alpha1", "NodeArtifacts", "nodeartifacts", False),
]
# Those of the other API server, which the controller and the node plugins use.
FOREIGN = {"nodes", "secrets", "artifactpreloads", "nodeartifacts"}
LOCK = threading.RLock()
OBJECTS = {}
VERSION = 0
PODS = {}
UPSTREAM = ""


def upstream(method, path, body=None, kind="application/json"):
    request = urllib.request.Request(f"http://{UPSTREAM}{path}", method=method, data=body)
    request.add_header("content-type", kind)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def collection(group, plural, namespace):
    root = f"/api/{group}" if "/" not in group else f"/apis/{group}"
    return f"{root}/namespaces/{namespace}/{plural}" if namespace else f"{root}/{plural}"


def store(path, document):
    """Keeps an object; a change of its specification is a new generation."""
    global VERSION
    with LOCK:
        before = OBJECTS.get(path, {})
        head = document.setdefault("metadata", {})
        known = before.get("metadata", {})
        VERSION += 1
        head["uid"] = known.get("uid") or str(uuid.uuid4())
        head["creationTimestamp"] = known.get("creationTimestamp") or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        changed = before.get("spec") != document.get("spec")
        head["generation"] = known.get("generation", 0) + (1 if changed or not before else 0)
        head["resourceVersion"] = str(VERSION)
        if document["kind"] in ("DaemonSet", "Deployment"):
            document["status"] = rolled_out(head["generation"])
        OBJECTS[path] = document
        return document


def rolled_out(generation):
    """The status of what runs everywhere: the controller and the node plugins of the test do."""
    counts = ("desiredNumberScheduled", "currentNumberScheduled", "updatedNumberScheduled", "numberAvailable", "numberReady")
    replicas = ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas")
    return {"observedGeneration": generation, "numberMisscheduled": 0} | dict.fromkeys(counts, 2) | dict.fromkeys(replicas, 1)


# Crossplane.


def composed_path(document):
    for group, kind, plural, _ in KINDS:
        if (group, kind) == (document["apiVersion"], document["kind"]):
            namespace = document["metadata"]["namespace"]
            return plural, f"{collection(group, plural, namespace)}/{document['metadata']['name']}"
    raise KeyError(document["kind"])


def read(plural, path):
    if plural in FOREIGN:
        status, document = upstream("GET", path)
        return document if status == 200 else None
    return OBJECTS.get(path)


def apply(plural, path, document):
    before = read(plural, path)
    if before and all(before.get(part) == document.get(part) for part in ("spec", "data")):
        if before["metadata"].get("annotations") == document["metadata"].get("annotations"):
            return
    if plural not in FOREIGN:
        if before and "status" in before:
            document["status"] = before["status"]
        store(path, document)
    elif before is None:
        upstream("POST", path.rpartition("/")[0], json.dumps(document).encode())
    else:
        change = {"spec": document["spec"], "metadata": {"annotations": document["metadata"].get("annotations")}}
        upstream("PATCH", path, json.dumps(change).encode(), "application/merge-patch+json")


def crossplane(composed):
    """One reconciliation of each object; `composed` has what was composed of it: name -> plural and path."""
    with LOCK:
        present = {path: json.loads(json.dumps(each)) for path, each in OBJECTS.items() if each["kind"] == "CustomPrometheus"}
    for path in [path for path in composed if path not in present]:
        for plural, made in composed.pop(path).values():
            upstream("DELETE", made) if plural in FOREIGN else OBJECTS.pop(made, None)
    for path, xr in present.items():
        made = composed.setdefault(path, {})
        observed = {name: document for name, place in made.items() if (document := read(*place))}
        wanted = xr["spec"]["crossplane"]["compositionRef"]["name"]
        # The definition's schema has the status without what Crossplane adds.
        seen = {key: value for key, value in xr.get("status", {}).items() if key != "conditions"}
        result = compose.reconcile(wanted, xr | {"status": seen}, observed)
        for name, document in result.desired.items():
            # What Helm's engine has made shares parts.
            document = json.loads(json.dumps(document))
            made[name] = composed_path(document)
            apply(*made[name], document)
        conditions = [
            {
                "type": kind,
                "status": str(status),
                "reason": "Available" if status else "Creating",
                "message": message,
                "observedGeneration": xr["metadata"]["generation"],
            }
            for kind, (status, message) in result.conditions.items()
        ]
        with LOCK:
            latest = OBJECTS.get(path)
            if latest and latest["metadata"]["generation"] == xr["metadata"]["generation"]:
                status = result.status | {"conditions": conditions}
                if latest.get("status") != status:
                    store(path, latest | {"status": status})


# The controller of StatefulSets.


def statefulsets():
    with LOCK:
        present = {path: each for path, each in OBJECTS.items() if each["kind"] == "StatefulSet"}
        for name in [name for name, pod in PODS.items() if pod["owner"] not in present]:
            del PODS[name]
        for path, document in present.items():
            name, template = document["metadata"]["name"], document["spec"]["template"]
            volume = template["spec"]["volumes"][0]["csi"]["volumeAttributes"]
            names = [f"{name}-{number}" for number in range(document["spec"]["replicas"])]
            mine = {each: PODS.get(each) for each in names}
            old = [each for each, pod in mine.items() if pod and pod["attributes"] != volume]
            # One after the other, the last first, and the next once the replaced one is ready.
            if old and all(pod and pod["ready"] for pod in mine.values()):
                del PODS[old[-1]]
                mine[old[-1]] = None
            for number, each in enumerate(names):
                if mine[each] is None:
                    PODS[each] = {
                        "owner": path,
                        "node": NODES[number % len(NODES)],
                        "namespace": document["metadata"]["namespace"],
                        "attributes": volume,
                        "uid": str(uuid.uuid4()),
                        "ready": False,
                    }
            mine = [PODS[each] for each in names]
            status = {
                "observedGeneration": document["metadata"]["generation"],
                "replicas": len(mine),
                "readyReplicas": sum(pod["ready"] for pod in mine),
                "updatedReplicas": sum(pod["attributes"] == volume for pod in mine),
            }
            if document.get("status") != status:
                store(path, document | {"status": status})


def play():
    composed = {}
    while True:
        crossplane(composed)
        statefulsets()
        time.sleep(0.1)


# The API server.


def discovery(path):
    groups = {}
    for group, *_ in KINDS:
        name, _, version = group.rpartition("/")
        groups.setdefault(name, []).append(version)
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        found = []
        for name, versions in groups.items():
            if name:
                versions = [{"groupVersion": f"{name}/{each}", "version": each} for each in dict.fromkeys(versions)]
                found.append({"name": name, "versions": versions, "preferredVersion": versions[0]})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": found}
    group = path.removeprefix("/apis/").removeprefix("/api/")
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    resources = [
        {"name": plural, "singularName": kind.lower(), "namespaced": namespaced, "kind": kind, "verbs": verbs}
        for known, kind, plural, namespaced in KINDS
        if known == group
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group, "resources": resources} if resources else None


class Handler(ApiHandler):
    def handle_request(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        parts = url.path.strip("/").split("/")
        if parts[0] == "play":
            return self.play(parts)
        if parts[0] not in ("api", "apis"):
            return self.refuse(404, "NotFound")
        rest = parts[2:] if parts[0] == "api" else parts[3:]
        if not rest:
            found = discovery(url.path)
            return self.answer(200, found) if found else self.refuse(404, "NotFound")
        if rest[0] == "namespaces" and len(rest) > 2:
            rest = rest[2:]
        if rest[0] in FOREIGN:
            return self.forward(url)
        if len(rest) == 1:
            return self.collection(url.path, rest[0], query)
        return self.object(url.path)

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = handle_request

    def forward(self, url):
        kind = self.headers.get("content-type") or "application/json"
        self.answer(*upstream(self.command, f"{url.path}?{url.query}", self.content() or None, kind))

    def play(self, parts):
        with LOCK:
            if parts[1] == "ready" and parts[2] in PODS:
                PODS[parts[2]]["ready"] = True
            self.answer(200, PODS)

    def collection(self, path, plural, query):
        (kind, group) = next((kind, group) for group, kind, each, _ in KINDS if each == plural)
        if self.command == "POST":
            document = self.body()
            namespace = path.rpartition("/namespaces/")[2].partition("/")[0] if "/namespaces/" in path else None
            if namespace:
                document["metadata"]["namespace"] = namespace
            place = f"{path}/{document['metadata']['name']}"
            if place in OBJECTS:
                return self.refuse(409, "AlreadyExists")
            return self.answer(201, store(place, document))
        name = query.get("fieldSelector", "").removeprefix("metadata.name=")

        def found():
            with LOCK:
                return [
                    each
                    for place, each in sorted(OBJECTS.items())
                    if place.rpartition("/")[0] == path and name in ("", each["metadata"]["name"])
                ]

        if query.get("watch") not in ("1", "true"):
            head = {"resourceVersion": str(VERSION)}
            return self.answer(200, {"kind": f"{kind}List", "apiVersion": group, "metadata": head, "items": found()})
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        seen = int(query.get("resourceVersion") or 0)
        ends = time.monotonic() + int(query.get("timeoutSeconds") or 600)
        while time.monotonic() < ends:
            for each in found():
                if int(each["metadata"]["resourceVersion"]) > seen:
                    try:
                        self.wfile.write(json.dumps({"type": "MODIFIED", "object": each}).encode() + b"\n")
                    except OSError:
                        # The watcher has seen enough.
                        return
            seen = max([seen, *(int(each["metadata"]["resourceVersion"]) for each in found())])
            time.sleep(0.05)

    def object(self, path):
        if path not in OBJECTS:
            return self.refuse(404, "NotFound")
        with LOCK:
            document = json.loads(json.dumps(OBJECTS[path]))
            if self.command in ("PATCH", "PUT"):
                change = self.body()
                if self.command == "PUT":
                    document = change
                else:
                    merge(document, change)
                document = store(path, document)
            elif self.command == "DELETE":
                self.content()
                OBJECTS.pop(path)
        self.answer(200, document)


def serve(address):
    global UPSTREAM
    UPSTREAM = address
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)

    def player():
        try:
            play()
        except Exception:
            # Without Crossplane the test would wait in vain.
            traceback.print_exc()
            os._exit(1)

    threading.Thread(target=player, daemon=True).start()
    server.serve_forever()


# Programs of the reader.


def helm(words):
    """helm install NAME CHART [--repo URL] [--namespace NAMESPACE] [--create-namespace] [--version V] [--wait]
    [--set K=V]..."""
    command, name, what, *options = words
    if command != "install":
        raise SystemExit(f"helm {command} is not known")
    values, namespace, create, repo = {}, "default", False, None
    while options:
        option = options.pop(0)
        if option == "--create-namespace":
            create = True
        elif option == "--wait":
            # What is played is ready at once.
            continue
        elif option in ("--namespace", "--set", "--repo", "--version"):
            value = options.pop(0)
            if option == "--namespace":
                namespace = value
            elif option == "--repo":
                repo = value
            elif option == "--set":
                key, _, value = value.partition("=")
                *folders, last = key.split(".")
                place = values
                for folder in folders:
                    place = place.setdefault(folder, {})
                place[last] = yaml.safe_load(value)
        else:
            raise SystemExit(f"helm install has no {option} here")
    if create:
        subprocess.run(["kubectl", "create", "namespace", namespace], check=True)
    # Crossplane's own chart is not to be had here; Crossplane is played.
    if repo is None:
        path = pathlib.Path(what).resolve()
        documents = [each for text in chart.texts(values, path=path).items() if text[0] != "NOTES.txt" for each in chart.documents(text[1])]
        for document in documents:
            namespaced = {kind: namespaced for _, kind, _, namespaced in KINDS}[document["kind"]]
            if namespaced:
                document["metadata"].setdefault("namespace", namespace)
        text = yaml.safe_dump_all(documents)
        subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True, check=True, stdout=subprocess.DEVNULL)
    print(f"NAME: {name}\nNAMESPACE: {namespace}\nSTATUS: deployed")


def go(words):
    """go build -o FOLDER/ PACKAGE...: each program says for which processor it is."""
    build, option, folder, *packages = words
    if (build, option) != ("build", "-o") or not packages or not folder.endswith("/"):
        raise SystemExit(f"go {' '.join(words)} is not known")
    for package in packages:
        if not pathlib.Path(package, "main.go").exists():
            raise SystemExit(f"{package} is no package")
        path = pathlib.Path(folder) / pathlib.Path(package).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\necho {path.name} for {os.environ['GOARCH']}\n")
        path.chmod(0o755)


if __name__ == "__main__":
    {"serve": lambda words: serve(*words), "helm": helm, "go": go}[sys.argv[1]](sys.argv[2:])
