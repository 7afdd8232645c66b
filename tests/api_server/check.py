"""What API servers decide about definitions, policies and the chart, asked of one of Kubernetes' own libraries.

    check.py PROGRAMS DRIVER    the folder with `api-server` and `etcd`, and the driver's program

Prints what is wrong, and exits 1 if anything is. See README.md.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

from server import ADMINISTRATOR, NAMESPACE, Server, account, free_port, of_node, wait_until

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "cluster"))

import admission
import chart
import fleet
import render
import startup_taint

REFERENCE = "registry.example.com/team/tool:v1"
PRELOAD = {"apiVersion": "oci.custom.io/v1alpha1", "kind": "ArtifactPreload"}


def preload(name="test", **spec):
    metadata = {"name": name, "namespace": "team"}
    return {**PRELOAD, "metadata": metadata, "spec": {"reference": REFERENCE, **spec}}


def definitions(server):
    """They are taken without a word, and taken again as what is there already."""
    config = server.kubeconfig("administrator", ADMINISTRATOR)
    files = chart.CHART / "files/crds"
    for round, expected in enumerate(("created", "unchanged")):
        command = ["kubectl", f"--kubeconfig={config}", "apply", f"--filename={files}"]
        said = subprocess.run(command, capture_output=True, text=True)
        lines = said.stdout.splitlines()
        if said.stderr or len(lines) != 2 or not all(each.endswith(expected) for each in lines):
            yield f"apply, time {round + 1}: {said.stdout}{said.stderr}"
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    names = [each["metadata"]["name"] for each in server.call("GET", path)[1]["items"]]

    def conditions(name):
        status = server.call("GET", f"{path}/{name}")[1].get("status", {})
        return {each["type"]: each["status"] for each in status.get("conditions", [])}

    for name in names:
        wait_until(name, lambda: conditions(name).get("Established") == "True")
        if conditions(name).keys() != {"Established", "NamesAccepted"}:
            yield f"{name}: {conditions(name)}"
    wait_until("their kinds", lambda: server.apply(preload(), dry_run=True) is None)


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
    """All that users apply is taken, strictly: each row of the chart, `deploy`, `examples` and what the page shows."""
    page = (chart.ROOT / "docs/preloading.md").read_text()
    shown = [each.partition("```")[0] for each in page.split("```yaml\n")[1:]]
    groups = {row: chart.objects(values) for row, values in chart.matrix().items()}
    groups |= render.plain() | render.kustomizations() | render.composed()
    groups["docs/preloading.md"] = [each for text in shown for each in chart.documents(text)]
    seen = 0
    for where, documents in groups.items():
        for document in documents:
            # What Flux fills in.
            document = json.loads(re.sub(r"\$\{\w+\}", "filled-in", json.dumps(document)))
            document["metadata"].setdefault("name", "test")
            if namespace := document["metadata"].get("namespace"):
                make_namespace(server, namespace)
            if document["kind"] != "List" and server.place(document):
                seen += document["kind"] == "ArtifactPreload"
                if said := server.apply(document, dry_run=True):
                    yield f"{where}: {document['kind']} {document['metadata']['name']}: {said}"
    if seen < 4:
        yield f"only {seen} preloads were among them"


def make_namespace(server, name):
    server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})


def node_objects(server):
    """With the rights that the chart gives, a node writes the status of its own object, and nothing else."""
    for document in chart.objects({"controller": {"enabled": True}}):
        if server.place(document) and (said := server.apply(document)):
            yield f"{document['kind']} {document['metadata']['name']}: {said}"
    for name in ("one", "two"):
        server.apply(node_artifacts(name, spec={"artifacts": []}))

    def status_of(name, token):
        return server.apply(node_artifacts(name, status={"ready": 1}), token, "/status")

    own = "the driver on a node may write the object of its own node only"
    wait_until("the policy on nodes", lambda: own in (status_of("two", of_node("one")) or ""))
    extras = ({}, {fleet.NODE_NAME: []}, {fleet.NODE_NAME: [""]}, {fleet.NODE_NAME: ["two"]}, {"pod": ["one"]})
    for extra in extras:
        said = status_of("one", account("csi-driver-oci", **extra))
        # What there is none of cannot be compared: the policy fails, which refuses too.
        if said is None or "csi-driver-oci-fleet-nodes" not in said:
            yield f"a token with {extra} writes the status of one: {said}"
    if said := status_of("one", of_node("one")):
        yield f"a node may not write its own status: {said}"
    for name in ("one", "three"):
        said = server.apply(node_artifacts(name, spec={"artifacts": []}), of_node("one"))
        if said is None or "no role allows it" not in said:
            yield f"a node writes what it is to hold: {said}"
    for name in ("one", "two"):
        server.call("DELETE", server.place(node_artifacts(name)))


def node_taints(server):
    """With the rights that the chart gives, a node removes its startup taint from itself, and changes nothing else."""
    make_namespace(server, NAMESPACE)
    for document in chart.objects({"startupTaint": {"enabled": True}}):
        if server.place(document) and (said := server.apply(document)):
            yield f"{document['kind']} {document['metadata']['name']}: {said}"
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
        after = json.loads(json.dumps(before))
        change(after)
        operations = [{"op": "replace", "path": "/spec", "value": after["spec"]}]
        for key in before["metadata"].keys() | after["metadata"].keys():
            if key not in after["metadata"]:
                operations.append({"op": "remove", "path": f"/metadata/{key}"})
            elif before["metadata"].get(key) != after["metadata"][key]:
                value = after["metadata"][key]
                operations.append({"op": "add", "path": f"/metadata/{key}", "value": value})
        query = "?dryRun=All" if dry_run else ""
        status, answer = server.call("PATCH", place + query, operations, token, "json-patch+json")
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
    if said := patch("worker-1", lambda node: node["spec"].update(unschedulable=True), ADMINISTRATOR):
        yield f"the administrator may not cordon a node: {said}"
    # The change that the driver makes, kept.
    if said := patch("worker-1", remove, own, dry_run=False):
        yield f"the taint cannot be removed: {said}"
    taints = server.call("GET", "/api/v1/nodes/worker-1")[1]["spec"]["taints"]
    if taints != [startup_taint.OTHER]:
        yield f"the taints are {taints}"
    for name in ("worker-1", "worker-2"):
        server.call("DELETE", f"/api/v1/nodes/{name}")


def node_artifacts(name, **parts):
    return {**PRELOAD, "kind": "NodeArtifacts", "metadata": {"name": name}, **parts}


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
        status, answer = server.call("POST", path, document)
        return None if status == 201 else answer["message"]

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


def warming(server):
    """The controller and a node plugin bring an artifact onto a node, with the rights that the chart gives each."""
    registry = f"127.0.0.1:{free_port()}"
    config = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(server.state / "registry")}},
        "http": {"addr": registry},
    }
    (server.state / "registry.json").write_text(json.dumps(config))
    server.start("docker-registry", "serve", server.state / "registry.json")
    (server.state / "file.txt").write_text("content")
    push = ["oras", "push", "--plain-http", f"{registry}/tool:v1", "file.txt"]

    def is_pushed():
        return subprocess.run(push, cwd=server.state, capture_output=True).returncode == 0

    wait_until("the registry", is_pushed)
    # A developer's disk may be fuller than a node's is allowed to be.
    config = {"apiVersion": "oci.custom.io/v1alpha1", "kind": "NodeConfiguration"}
    config["cache"] = {"minFreePercent": 0, "minFreeInodesPercent": 0}
    config["cache"] |= {"highThresholdPercent": 100, "lowThresholdPercent": 100}
    (server.state / "node.yaml").write_text(json.dumps(config))
    server.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "one"}})
    server.start(
        server.driver,
        "controller",
        "--identity=test",
        f"--namespace={NAMESPACE}",
        "--lease-name=csi-driver-oci-fleet",
        "--health-endpoint=",
        "--metrics-endpoint=",
        KUBECONFIG=server.kubeconfig("controller", account("csi-driver-oci-fleet")),
    )
    server.start(
        server.driver,
        "node",
        "--fleet",
        "--node-id=one",
        f"--endpoint=unix://{server.state}/csi.sock",
        f"--state-dir={server.state}/state",
        f"--kubelet-dir={server.state}",
        f"--admin-endpoint=unix://{server.state}/admin.sock",
        f"--config={server.state}/node.yaml",
        "--registration-dir=",
        "--health-endpoint=",
        "--metrics-endpoint=",
        KUBECONFIG=server.kubeconfig("node", of_node("one")),
    )
    server.apply(preload("tool", reference=f"{registry}/tool:v1"))
    command = ["kubectl", f"--kubeconfig={server.state}/administrator.kubeconfig", "wait"]
    command += ["--namespace=team", "artifactpreload/tool", "--for=condition=Ready", "--timeout=60s"]
    said = subprocess.run(command, capture_output=True, text=True)
    if said.returncode != 0:
        yield said.stderr
    status = server.call("GET", server.place(preload("tool")))[1]["status"]
    if (status["desired"], status["ready"]) != (1, 1):
        yield f"the status is {status}"
    for log in server.state.glob("*csi-driver-oci.log"):
        if "refuse" in log.read_text() or said.returncode != 0:
            yield f"{log.name}:\n{log.read_text()}"


CHECKS = (definitions, preloads, manifests, node_objects, node_taints, volumes, warming)


def main(programs, driver):
    failed = False
    with tempfile.TemporaryDirectory() as state, Server(programs, driver, state) as server:
        for namespace in ("default", "team"):
            make_namespace(server, namespace)
        for check in CHECKS:
            problems = []
            try:
                problems += check(server)
            except TimeoutError as error:
                problems.append(f"waited in vain for {error}")
            print(f"{check.__name__}: {'failed' if problems else 'ok'}", *problems, sep="\n  ", flush=True)
            failed = failed or bool(problems)
    return failed


if __name__ == "__main__":
    raise SystemExit(main(*map(pathlib.Path, sys.argv[1:])))
