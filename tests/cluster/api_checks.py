"""What the API server of a cluster decides about definitions, policies, the chart and the manifests.

    api_checks.py NAME    one check, against the cluster of KUBECONFIG that the chart is installed in

Prints what is wrong, and exits 1 if anything is.
"""

import copy
import json
import re
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request

import admission
import chart
import compose
import crossplane
import fleet
import node_status as nodes
import pull_secrets
import provisioner
import render
import startup_taint

NAMESPACE = "csi-driver-oci"
REFERENCE = "registry.example.com/team/tool:v1"
PRELOAD = {"apiVersion": "oci.custom.io/v1alpha1", "kind": "ArtifactPreload"}


def wait_until(what, condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited in vain for {what}")
        time.sleep(0.1)


def kubectl(*arguments, **options):
    return subprocess.run(["kubectl", *arguments], check=True, capture_output=True, text=True, **options).stdout


class Server:
    """The API server of KUBECONFIG."""

    def __init__(self):
        config = json.loads(kubectl("config", "view", "--raw", "--output=json"))
        cluster = config["clusters"][0]["cluster"]
        self.address = cluster["server"]
        self.administrator = config["users"][0]["user"]["token"]
        self.trust = ssl.create_default_context(cafile=cluster["certificate-authority"])
        self.pods = 0

    def call(self, method, path, body=None, token=None, form="json"):
        """Status and answer of one request."""
        request = urllib.request.Request(
            self.address + path,
            method=method,
            # What is applied is read as YAML, which has no surrogate pairs.
            data=None if body is None else json.dumps(body, ensure_ascii=False).encode(),
            headers={
                "Authorization": f"Bearer {token or self.administrator}",
                "Content-Type": f"application/{form}",
            },
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

    def apply(self, document, token=None, part="", dry_run=False):
        """Server-side apply, strictly; what is wrong with it, if anything is."""
        query = "?fieldManager=test&force=true&fieldValidation=Strict"
        query += "&dryRun=All" if dry_run else ""
        path = self.place(document) + part + query
        status, answer = self.call("PATCH", path, document, token, "apply-patch+yaml")
        return None if status in (200, 201) else answer["message"]

    def token_on(self, node):
        """A token of the node plugin's service account: of a pod on a node, or of no pod."""
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        if node:
            self.pods += 1
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"check-{self.pods}"}}
            pod["spec"] = {"nodeName": node, "serviceAccountName": NAMESPACE, "containers": CONTAINERS}
            status, made = self.call("POST", f"/api/v1/namespaces/{NAMESPACE}/pods", pod)
            if status != 201:
                raise RuntimeError(made["message"])
            bound = {key: made["metadata"][key] for key in ("name", "uid")}
            request["spec"]["boundObjectRef"] = {"apiVersion": "v1", "kind": "Pod", **bound}
        path = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{NAMESPACE}/token"
        status, answer = self.call("POST", path, request)
        if status != 201:
            raise RuntimeError(answer["message"])
        return answer["status"]["token"]

    def forget_pods(self):
        """Deletes the pods of `token_on`."""
        for number in range(1, self.pods + 1):
            path = f"/api/v1/namespaces/{NAMESPACE}/pods/check-{number}?gracePeriodSeconds=0"
            self.call("DELETE", path)


CONTAINERS = [{"name": "main", "image": "docker.io/library/busybox:1.37"}]


def complete(document):
    """A copy with what the API server wants of each kind, beside what a policy looks at."""
    document = copy.deepcopy(document)
    kind, spec = document["kind"], document["spec"]
    if kind == "CronJob":
        spec["schedule"] = "0 * * * *"
        spec = spec["jobTemplate"]["spec"]
    template = spec.get("template")
    pod = template["spec"] if template else spec if kind == "Pod" else None
    if pod:
        pod["containers"] = CONTAINERS
        if kind in ("Job", "CronJob"):
            pod["restartPolicy"] = "Never"
    if kind in ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet"):
        template["metadata"] = {"labels": {"app": "test"}}
        spec["selector"] = {"matchLabels": {"app": "test"}}
    if kind == "StatefulSet":
        spec["serviceName"] = "test"
    if kind == "PersistentVolume":
        spec.update(capacity={"storage": "1Gi"}, accessModes=["ReadOnlyMany"])
    return document


def preload(name="test", **spec):
    metadata = {"name": name, "namespace": "team"}
    return {**PRELOAD, "metadata": metadata, "spec": {"reference": REFERENCE, **spec}}


def definitions(server):
    """They are established, and what the chart has of them is what is there already."""
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    for name in ("artifactpreloads", "nodeartifacts"):
        status = server.call("GET", f"{path}/{name}.oci.custom.io")[1].get("status", {})
        conditions = {each["type"]: each["status"] for each in status.get("conditions", [])}
        if conditions != {"Established": "True", "NamesAccepted": "True"}:
            yield f"{name}: {conditions}"
    files = f"--filename={chart.CHART / 'files/crds'}"
    different = subprocess.run(["kubectl", "diff", files], capture_output=True, text=True)
    changed = [line for line in different.stdout.splitlines() if re.match(r"[+-]\s+\S", line)]
    if changed := [line for line in changed if "generation:" not in line]:
        yield f"they are not what the chart has: {changed}"


# Spec of a preload -> what a person is told. What tests/cluster/fleet.py has comes on top.
REFUSED = [
    ({"reference": None}, "spec.reference: Required value"),
    ({"reference": "tool@sha256:12"}, "a digest is written as @sha256: and 64 hexadecimal digits"),
    ({"reference": "tool v1"}, "spec.reference in body should match"),
    ({"reference": "a" * 513}, "spec.reference: Too long: may not be more than 512 bytes"),
    ({"spread": "1d"}, "spec.spread in body should match"),
    ({"spread": "24h1ms"}, "nodes begin within a day: write at most 24h"),
    ({"spread": ""}, "spec.spread in body should match"),
    ({"parallelism": 0}, "spec.parallelism in body should be greater than or equal to 1"),
    ({"parallelism": 10001}, "spec.parallelism in body should be less than or equal to 10000"),
    ({"parallelism": "101%"}, "spec.parallelism in body should match"),
    ({"parallelism": True}, "spec.parallelism in body must be of type integer,string"),
    ({"toleratedNodes": -1}, "spec.toleratedNodes in body should be greater than or equal to 0"),
    ({"toleratedNodes": "101%"}, "spec.toleratedNodes in body should match"),
    ({"platforms": ["linux"]}, "spec.platforms[0] in body should match"),
    ({"platforms": ["linux/amd64"] * 2}, 'spec.platforms[1]: Duplicate value: "linux/amd64"'),
    ({"platforms": [f"linux/{n}" for n in range(17)]}, "spec.platforms: Too many: 17: must have at most 16"),
    ({"pullSecrets": ["A"]}, "spec.pullSecrets[0] in body should match"),
    ({"pullSecrets": [f"s{n}" for n in range(9)]}, "spec.pullSecrets: Too many: 9: must have at most 8"),
    ({"selector": {"names": [""]}}, "spec.selector.names[0] in body should be at least 1 chars long"),
    ({"selector": {"names": [f"n{n}" for n in range(501)]}}, "spec.selector.names: Too many: 501"),
    ({"selector": {"matchLabels": {"pool": None}}}, 'a label has a value, which may be ""'),
    ({"selector": {"matchLabels": {"pool": "p" * 64}}}, "spec.selector.matchLabels.pool: Too long"),
    ({"selector": {"matchLabels": {f"l{n}": "" for n in range(17)}}}, "must have at most 16 items"),
    ({"timeoutSeconds": 0}, "spec.timeoutSeconds in body should be greater than or equal to 1"),
    ({"timeoutSeconds": 86401}, "spec.timeoutSeconds in body should be less than or equal to 86400"),
    ({"backoffLimit": 21}, "spec.backoffLimit in body should be less than or equal to 20"),
    ({"ttlSecondsAfterFinished": -1}, "spec.ttlSecondsAfterFinished in body should be greater"),
    ({"pin": "yes"}, "spec.pin in body must be of type boolean"),
    ({"refrence": "misspelt"}, 'unknown field "spec.refrence"'),
]


def preloads(server):
    """What is right is taken, and what is wrong is refused with a message that says why, and with no other."""

    def create(spec):
        path = server.place(preload()).rpartition("/")[0] + "?dryRun=All&fieldValidation=Strict"
        status, answer = server.call("POST", path, preload(**spec))
        return None if status == 201 else answer["message"]

    for spec, message in REFUSED:
        said = create(spec) or "nothing"
        if message not in said or "conversion" in said:
            yield f"{spec}: {said}"
    for field, cases in fleet.VALUES.items():
        for value, allowed in cases:
            said = create({field: value})
            if (said is None) != allowed:
                yield f"{field} {value!r}: {said or 'accepted'}"
    for labels in ({}, {"pool": ""}, {"pool": "tools"}):
        if said := create({"selector": {"matchLabels": labels}}):
            yield f"{labels}: {said}"


def manifests(server):
    """All that users apply is taken, strictly: each row of the chart, `deploy`, `examples` and what the pages show."""
    pages = {name: (chart.ROOT / name).read_text() for name in ("docs/preloading.md", "docs/how-to/claims.md")}
    # Not the names of the release that is installed: what two appliers write is merged.
    chart.RELEASE = "checks"
    version = server.call("GET", "/version")[1]["gitVersion"].removeprefix("v")
    groups = {row: chart.objects(values, version) for row, values in chart.matrix().items()}
    groups |= render.plain() | render.kustomizations() | render.composed()
    for name, page in pages.items():
        shown = [each.partition("```")[0] for each in page.split("```yaml\n")[1:]]
        groups[name] = [each for text in shown for each in chart.documents(text)]
    seen = 0
    for where, documents in groups.items():
        for document in documents:
            # What Flux fills in.
            text = json.dumps(document).replace("${digest}", f"sha256:{'0' * 64}")
            document = json.loads(re.sub(r"\$\{\w+\}", "filled-in", text))
            document["metadata"].setdefault("name", "test")
            if namespace := document["metadata"].get("namespace"):
                make_namespace(server, namespace)
            if document["kind"] != "List" and server.place(document):
                seen += document["kind"] == "ArtifactPreload"
                if said := server.apply(document, dry_run=True):
                    yield f"{where}: {document['kind']} {document['metadata']['name']}: {said}"
    if seen < 4:
        yield f"only {seen} preloads were among them"


def definition_of_crossplane():
    """The definition that Crossplane makes of the XRD, whose own fields are left open."""
    definition = copy.deepcopy(compose.XRD["spec"])
    for version in definition["versions"]:
        properties = version["schema"]["openAPIV3Schema"]["properties"]
        name = {"type": "string", "maxLength": 63}
        properties["metadata"] = {"type": "object", "properties": {"name": name}}
        properties |= {field: {"type": "string"} for field in ("apiVersion", "kind")}
        free = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        properties["spec"]["properties"]["crossplane"] = free
        version["storage"] = version.pop("referenceable")
        version["subresources"]["status"] = {}
    spec = {key: definition[key] for key in ("scope", "group", "names", "versions")}
    kind = {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition"}
    return {**kind, "metadata": {"name": compose.XRD["metadata"]["name"]}, "spec": spec}


def custom_prometheus(server):
    """Wrong objects are refused, and what is composed of right ones is taken, whatever texts they have."""
    definition, example = definition_of_crossplane(), render.example()
    if said := server.apply(definition):
        yield f"the definition: {said}"
    path = server.place(definition)
    try:
        make_namespace(server, example["metadata"]["namespace"])
        wait_until("the definition", lambda: server.place(example) and not server.apply(example, dry_run=True))
        yield from custom_prometheuses(server, example)
    finally:
        server.call("DELETE", path)
        wait_until("its end", lambda: server.call("GET", path)[0] == 404)


def custom_prometheuses(server, example):

    def create(document):
        path = server.place(document).rpartition("/")[0] + "?dryRun=All&fieldValidation=Strict"
        status, answer = server.call("POST", path, document)
        return None if status == 201 else answer["message"]

    for fields, message in crossplane.WRONG:
        said = create(crossplane.changed(**fields)) or "nothing"
        if message not in said:
            yield f"{fields}: {said}"
    for name, allowed in crossplane.NAMES:
        example["metadata"]["name"] = name
        said = create(example)
        if (said is None) != allowed:
            yield f"the name {name}: {said or 'accepted'}"
    for labels, allowed in crossplane.LABELS:
        said = create(crossplane.changed(externalLabels=labels))
        if (said is None) != allowed:
            yield f"the labels {labels}: {said or 'accepted'}"
    for xr in crossplane.odd_objects():
        make_namespace(server, xr["metadata"]["namespace"])
        at_once, _ = compose.compose(crossplane.PLAIN, xr)
        held, _ = compose.compose(crossplane.GATED, xr)
        ready = {"artifact": compose.preloaded(held["artifact"], crossplane.DIGEST)}
        gated, _ = compose.compose(crossplane.GATED, xr, ready)
        for document in (xr, *at_once.values(), *gated.values()):
            if said := server.apply(document, dry_run=True):
                yield f"{document['kind']} of {xr['metadata']}, {xr['spec']}: {said}"


def make_namespace(server, name, **metadata):
    server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, **metadata}})


def make_namespace_of_pods(server, name, **metadata):
    """A namespace with the service account without which pods are refused."""
    make_namespace(server, name, **metadata)
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
    path = f"/api/v1/namespaces/{name}/serviceaccounts"
    wait_until("the service account", lambda: server.call("POST", path, account)[0] in (201, 409))


def node_taints(server):
    """With the rights that the chart gives, a node removes its startup taint from itself, and changes nothing else."""
    for name in ("worker-1", "worker-2"):
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
        node["metadata"]["labels"] = startup_taint.NODE["metadata"]["labels"]
        node["spec"] = startup_taint.NODE["spec"]
        status, answer = server.call("POST", "/api/v1/nodes", node)
        if status != 201:
            yield f"{name} cannot be made: {answer['message']}"

    def patch(name, change, token, part="", dry_run=True):
        """What the API server says of a change, or nothing where it takes it."""
        place = f"/api/v1/nodes/{name}{part}"
        before = server.call("GET", f"/api/v1/nodes/{name}")[1]
        after = copy.deepcopy(before)
        # What Kubernetes adds to a node without a kubelet, which no change here is about.
        added = [each for each in before["spec"]["taints"] if each["key"].startswith("node.kubernetes.io/")]
        after["spec"]["taints"] = [each for each in before["spec"]["taints"] if each not in added]
        change(after)
        if "taints" in after["spec"]:
            after["spec"]["taints"] += added
        operations = [{"op": "replace", "path": "/spec", "value": after["spec"]}]
        for key in before["metadata"].keys() | after["metadata"].keys():
            if key not in after["metadata"]:
                operations.append({"op": "remove", "path": f"/metadata/{key}"})
            elif before["metadata"].get(key) != after["metadata"][key]:
                value = after["metadata"][key]
                operations.append({"op": "add", "path": f"/metadata/{key}", "value": value})
        query = "?dryRun=All" if dry_run else ""
        status, answer = server.call("PATCH", place + query, operations, token, "json-patch+json")
        # Kubernetes may have added a taint meanwhile, which the change would have removed.
        if dry_run and server.call("GET", f"/api/v1/nodes/{name}")[1]["spec"] != before["spec"]:
            return patch(name, change, token, part)
        return None if status == 200 else answer["message"]

    own = server.token_on("worker-1")

    def remove(node):
        node["spec"]["taints"] = [startup_taint.OTHER]

    other = "the driver on a node may change its own node only"
    wait_until("the policy on taints", lambda: other in (patch("worker-2", remove, own) or ""))
    for name, change, refusal in startup_taint.CHANGES:
        # A field that the API server does not know is none, and no change.
        if name == "a field of the future":
            continue
        said = patch("worker-1", change, own)
        if (said is None) != (refusal is None):
            yield f"{name}: {said or 'allowed'}"
        # What nobody may change is refused before the policy is asked.
        elif said and "provider" not in name and not ("csi-driver-oci-startup-taint" in said and refusal in said):
            yield f"{name}: refused, but with {said}"
    for node in (None, "worker-2"):
        if patch("worker-1", remove, server.token_on(node)) is None:
            yield f"a token of a pod on {node} changes worker-1"
    if patch("worker-1", remove, own, part="/status") is None:
        yield "a node changes its status"
    for verb, path in (("POST", "/api/v1/nodes"), ("DELETE", "/api/v1/nodes/worker-1")):
        if server.call(verb, path, startup_taint.NODE, own)[0] != 403:
            yield f"{verb} {path} is allowed"
    # What the policy is not for is as it was.
    if said := patch("worker-1", lambda node: node["spec"].update(unschedulable=True), server.administrator):
        yield f"the administrator may not cordon a node: {said}"
    # The change that the driver makes, kept.
    if said := patch("worker-1", remove, own, dry_run=False):
        yield f"the taint cannot be removed: {said}"
    taints = server.call("GET", "/api/v1/nodes/worker-1")[1]["spec"]["taints"]
    if startup_taint.OTHER not in taints or any(each["key"] == startup_taint.OURS["key"] for each in taints):
        yield f"the taints are {taints}"
    server.forget_pods()
    for name in ("worker-1", "worker-2"):
        server.call("DELETE", f"/api/v1/nodes/{name}")


def node_status(server):
    """With the rights that the chart gives, and with more, the controller changes only its part of a node."""
    account = f"{NAMESPACE}-fleet"
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    path = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{account}/token"
    token = server.call("POST", path, request)[1]["status"]["token"]
    node = "/api/v1/nodes/worker-3"
    document = copy.deepcopy(nodes.NODE)
    document["metadata"] = {key: document["metadata"][key] for key in ("labels", "annotations")} | {"name": "worker-3"}
    # A client of this name removes its labels of artifacts that the node does not hold.
    server.call("POST", "/api/v1/nodes", document)
    created = server.call("GET", node)[1]
    server.call("PUT", node + "/status", created | {"status": nodes.NODE["status"]})

    def put(change, part="/status"):
        """What the API server says of a change, or nothing where it takes it; and the node then."""
        while True:
            before = server.call("GET", node)[1]
            after = copy.deepcopy(before)
            change(after)
            status, answer = server.call("PUT", f"{node}{part}?dryRun=All", after, token)
            # The leader and Kubernetes write to the node as well.
            if status != 409:
                return (None, before, answer) if status == 200 else (answer["message"], before, None)

    cordon = [{"op": "add", "path": "/spec/unschedulable", "value": True}]
    for part, expected in (("", 403), ("/status", 200)):
        status, answer = server.call("PATCH", node + part, cordon, token, "json-patch+json")
        if status != expected or server.call("GET", node)[1]["spec"].get("unschedulable"):
            yield f"a patch of nodes{part} that cordons: {status} {answer.get('message')}"
    # Then the policy alone stands before everything.
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "checks-nodes"}}
    role["rules"] = [{"apiGroups": [""], "resources": ["nodes", "nodes/status"], "verbs": ["*"]}]
    binding = role | {"kind": "ClusterRoleBinding"}
    del binding["rules"]
    binding["roleRef"] = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "checks-nodes"}
    binding["subjects"] = [{"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}]
    for each in (role, binding):
        if said := server.apply(each):
            yield said
    wait_until("more rights", lambda: "cannot" not in (put(lambda node: None)[0] or ""))
    for name, change, refusal in nodes.CHANGES:
        said, before, after = put(change)
        if refusal == nodes.SPEC:
            # The API server ignores it.
            if said or after["spec"] != before["spec"]:
                yield f"{name}: {said or after['spec']}"
        elif (said is None) != (refusal is None):
            yield f"{name}: {said or 'allowed'}"
        elif said and not (f"{account}-node-status" in said and refusal in said):
            yield f"{name}: refused, but with {said}"
        said = put(change, "")[0] or "allowed"
        if "nothing but the status and labels" not in said and name != "nothing":
            yield f"{name}, of the whole node: {said}"
    document["metadata"]["name"] = "worker-4"
    status, answer = server.call("POST", "/api/v1/nodes?dryRun=All", document, token)
    if status != 403 and "nothing but the status" not in answer["message"]:
        yield f"it creates nodes: {answer}"
    for each in (binding, role):
        server.call("DELETE", server.place(each))
    server.call("DELETE", node)


def node_objects(server):
    """With the rights that the chart gives, a node writes the status of its own object, and nothing else."""
    own = "the driver on a node may write the object of its own node only"
    token = server.token_on("node-1")

    def node_artifacts(name, **parts):
        return {**PRELOAD, "kind": "NodeArtifacts", "metadata": {"name": name}, **parts}

    def write(name, token, part="/status", **parts):
        parts = parts or {"status": {"ready": 1}}
        return server.apply(node_artifacts(name, **parts), token, part, dry_run=True)

    wait_until("a refusal by the policy", lambda: own in (write("node-2", token) or ""))
    if said := write("node-1", token):
        yield f"a node may not write its own status: {said}"
    for name in ("node-1", "node-3"):
        said = write(name, token, "", spec={"artifacts": []})
        if said is None or "forbidden" not in said:
            yield f"a node writes what {name} is to hold: {said}"
    if write("node-1", server.token_on(None)) is None:
        yield "a token of no pod writes the status of node-1"
    server.forget_pods()


def provisioner_volumes(server):
    """With the rights that the chart gives, the controller writes volumes of this driver and provisioner only."""
    account = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{NAMESPACE}-fleet/token"
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    token = server.call("POST", account, request)[1]["status"]["token"]
    path = "/api/v1/persistentvolumes"

    def said(method, place, body=None, token=token, form="json", dry_run=True):
        status, answer = server.call(method, place + ("?dryRun=All" if dry_run else ""), body, token, form)
        return "" if status in (200, 201) else answer["message"]

    def wrong(what, answer, refusal):
        if bool(answer) != bool(refusal) or (refusal or "") not in answer:
            yield f"{what}: {answer or 'allowed'}"

    hostile = provisioner.changed(provisioner.host_path)
    wait_until("the policy", lambda: provisioner.DRIVER in said("POST", path, hostile))
    for name, change, refusal in provisioner.CREATED:
        yield from wrong(f"creating {name}", said("POST", path, provisioner.changed(change)), refusal)
    yield from wrong("the administrator's hostPath", said("POST", path, hostile, server.administrator), None)

    # A volume of the controller that is bound, so that neither the driver nor Kubernetes deletes it, and one of others.
    claims = "/api/v1/namespaces/default/persistentvolumeclaims"
    spec = {key: provisioner.VOLUME["spec"][key] for key in ("accessModes", "storageClassName")}
    spec |= {"resources": {"requests": {"storage": "1Gi"}}}
    claim = {"metadata": {"generateName": "provisioner-check-"}, "spec": spec}
    # The claim waits: there is no such class.
    claim = server.call("POST", claims, claim)[1]
    name, uid = claim["metadata"]["name"], claim["metadata"]["uid"]
    own = copy.deepcopy(provisioner.VOLUME)
    own["metadata"]["name"] = f"pvc-{uid}"
    own["spec"]["claimRef"] |= {"namespace": "default", "name": name, "uid": uid}
    foreign = copy.deepcopy(hostile)
    foreign["metadata"] = {"name": f"foreign-{uid}"}
    foreign["spec"] |= {"claimRef": None, "storageClassName": "foreign", "persistentVolumeReclaimPolicy": "Retain"}
    try:
        for volume, asks in ((own, token), (foreign, server.administrator)):
            if problem := said("POST", path, volume, asks, dry_run=False):
                yield f"{volume['metadata']['name']} cannot be made: {problem}"
        place, others = (f"{path}/{volume['metadata']['name']}" for volume in (own, foreign))
        for name, change, refusal in provisioner.CHANGES:
            answer = None
            while answer is None or "has been modified" in answer:
                after = server.call("GET", place)[1]
                change(after)
                is_possible = not said("PUT", place, after, server.administrator)
                parts = [{"op": "replace", "path": f"/{part}", "value": after[part]} for part in ("metadata", "spec")]
                answer = said("PATCH", place, parts, form="json-patch+json")
            # What nobody may change is refused before the policy is asked.
            if is_possible or not answer:
                yield from wrong(name, answer, refusal)
        label = {"metadata": {"labels": {"a": "b"}}}
        yield from wrong("a foreign volume", said("PATCH", others, label, form="merge-patch+json"), provisioner.DRIVER)
        yield from wrong("deleting a foreign volume", said("DELETE", others), provisioner.DRIVER)
        yield from wrong("deleting its own", said("DELETE", place), None)
        yield from wrong("its claim", said("DELETE", f"{claims}/{claim['metadata']['name']}"), "forbidden")
        yield from wrong("secrets", said("GET", "/api/v1/namespaces/default/secrets"), "forbidden")
    finally:
        for gone in (f"{claims}/{claim['metadata']['name']}", f"{path}/{own['metadata']['name']}", f"{path}/{foreign['metadata']['name']}"):
            server.call("DELETE", gone)


def volumes(server):
    """The chart's admission policy, in every kind of object that a volume can come in."""
    versions = {"Pod": "v1", "PersistentVolume": "v1", "Job": "batch/v1", "CronJob": "batch/v1"}
    versions["ArtifactPreload"] = PRELOAD["apiVersion"]

    def said_of(document):
        document = {"apiVersion": versions.get(document["kind"], "apps/v1"), **document}
        document["metadata"] = {"name": "test", "namespace": "team"}
        if document["kind"] == "PersistentVolume":
            del document["metadata"]["namespace"]
        path = server.place(document).rpartition("/")[0] + "?dryRun=All"
        status, answer = server.call("POST", path, complete(document))
        return None if status == 201 else answer["message"]

    # Beside the objects of the release that is installed.
    chart.RELEASE = "checks"

    def install(wrong, message, **values):
        for document in chart.objects({"admissionPolicy": {"enabled": True, **values}}):
            if document["kind"].startswith("ValidatingAdmissionPolicy"):
                if said := server.apply(document):
                    yield said
        pod = {"kind": "Pod", "spec": admission.pod_spec(*wrong)}
        wait_until(f"a refusal with {message!r}", lambda: message in (said_of(pod) or ""))

    allowed = {"repositories": admission.ALLOWED}
    evil = {"reference": "evil.org/tool:v1"}
    for wrong, message, values, cases in (
        ([evil], "only, not: evil.org/tool:v1", allowed, admission.REPOSITORIES),
        ([{}], "must be pinned by digest", {"requireDigest": True}, admission.DIGESTS),
    ):
        yield from install(wrong, message, **values)
        for attributes, is_allowed in cases:
            for document in admission.carriers(attributes):
                said = said_of(document)
                if (said is None) != is_allowed:
                    yield f"{document['kind']} with {attributes}: {said or 'allowed'}"
    # Longer than a message may be: it is told in short, and not by the expression.
    long = [{"reference": f"evil.org/{n}/" + "x" * 400} for n in range(20)]
    yield from install(long, "artifacts of some repositories only", **allowed)
    for kind in ("validatingadmissionpolicybindings", "validatingadmissionpolicies"):
        server.call("DELETE", f"/apis/admissionregistration.k8s.io/v1/{kind}/checks-csi-driver-oci")


def pods_pull_secrets(server):
    """The chart's policy writes pull secrets into volumes of new pods, and changes nothing else."""
    # New objects: the API server may see a change of an annotation late.
    namespaces = {annotation: f"pull-secrets-{index}" for index, annotation in enumerate((None, "default", "two words", ""))}
    for annotation, name in namespaces.items():
        make_namespace_of_pods(server, name, **pull_secrets.annotations(annotation))

    def create(document, annotation=None):
        document = copy.deepcopy(document)
        document["metadata"].setdefault("name", "test")
        document["spec"]["containers"] = CONTAINERS
        # The volume of a token has a random name.
        document["spec"]["automountServiceAccountToken"] = False
        path = f"/api/v1/namespaces/{namespaces[annotation]}/pods?dryRun=All"
        status, answer = server.call("POST", path, {"apiVersion": "v1", **document})
        return answer["spec"] if status == 201 else {"message": answer["message"]}

    def secrets(spec):
        volumes = spec.get("volumes", [])
        return spec.get("message") or [each.get("csi", {}).get("nodePublishSecretRef", {}).get("name") for each in volumes]

    def without_secrets(spec):
        spec = copy.deepcopy(spec)
        for each in spec.get("volumes", []):
            each.get("csi", {}).pop("nodePublishSecretRef", None)
        return spec

    def objects(**values):
        rendered = chart.objects({"podPullSecrets": {"enabled": True, **values}}, version)
        return [each for each in rendered if each["kind"].startswith("MutatingAdmissionPolicy")]

    def install(documents):
        return [said for each in documents if (said := server.apply(each))]

    version = server.call("GET", "/version")[1]["gitVersion"].removeprefix("v")
    chart.RELEASE = "checks"
    before = [create(pull_secrets.pod(given, volumes), annotation) for _, given, annotation, volumes, _ in pull_secrets.CASES]
    one = pull_secrets.pod(["first"], [pull_secrets.OURS])
    yield from install(objects())
    wait_until("a secret in a volume", lambda: secrets(create(one)) == ["first"])
    for (name, given, annotation, volumes, expected), plain in zip(pull_secrets.CASES, before):
        spec = create(pull_secrets.pod(given, volumes), annotation)
        if secrets(spec) != expected:
            yield f"{name}: the secrets are {secrets(spec)}, expected {expected}"
        if without_secrets(spec) != without_secrets(plain):
            yield f"{name}: {plain} has become {spec}"
    # The API server refuses secrets in a static pod.
    static = pull_secrets.pod([], [pull_secrets.OURS], annotations=pull_secrets.MIRROR)
    static["spec"]["nodeName"] = "node-1"
    if (said := secrets(create(static, "default"))) != [None]:
        yield f"a static pod: {said}"
    # The first one of a service account.
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "puller"}}
    account["imagePullSecrets"] = [{"name": "of-account"}]
    server.call("POST", f"/api/v1/namespaces/{namespaces['default']}/serviceaccounts", account)
    of_account = pull_secrets.pod([], [pull_secrets.OURS])
    of_account["spec"]["serviceAccountName"] = "puller"
    wait_until("a secret of the account", lambda: secrets(create(of_account, "default")) == ["of-account"])
    # Another policy, which comes later, adds a pull secret.
    policy, binding = copy.deepcopy(objects())
    (mutation,) = policy["spec"]["mutations"]
    patch = "[JSONPatch{op: 'add', path: '/spec/imagePullSecrets', value: [{'name': 'added'}]}]"
    mutation["jsonPatch"]["expression"] = patch
    policy["spec"]["matchConstraints"]["objectSelector"] = {"matchLabels": {"adds": "secret"}}
    binding["spec"]["policyName"] = policy["metadata"]["name"] = binding["metadata"]["name"] = "z-checks"
    yield from install([policy, binding])
    added = pull_secrets.pod([], [pull_secrets.OURS], labels={"adds": "secret"})
    wait_until("the other policy", lambda: "imagePullSecrets" in create(added))
    if (said := secrets(create(added))) != ["added"]:
        yield f"a pull secret that another policy adds: {said}"
    selected = {"matchLabels": {"kubernetes.io/metadata.name": namespaces["default"]}}
    yield from install(objects(namespaceSelector=selected))
    wait_until("a namespace without the policy", lambda: secrets(create(one)) == [None])
    if (said := secrets(create(one, "default"))) != ["first"]:
        yield f"a selected namespace: {said}"
    for document in [policy, binding, *objects()]:
        server.call("DELETE", server.place(document))
    for name in namespaces.values():
        server.call("DELETE", f"/api/v1/namespaces/{name}")


CHECKS = {
    check.__name__: check
    for check in (
        definitions, preloads, manifests, custom_prometheus, node_objects, node_status, node_taints, provisioner_volumes,
        volumes, pods_pull_secrets,
    )
}  # fmt: skip


def main(name):
    server = Server()
    for namespace in ("default", "team"):
        make_namespace_of_pods(server, namespace)
    problems = list(CHECKS[name](server))
    print(*problems, sep="\n")
    return bool(problems)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
