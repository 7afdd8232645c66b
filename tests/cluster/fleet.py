"""Warming a fleet: what the API server decides by itself, its expressions evaluated as it evaluates them."""

import re

import celpy

import chart

ACCOUNT = "system:serviceaccount:csi-driver-oci:csi-driver-oci"
NODE_NAME = "authentication.kubernetes.io/node-name"
DIGEST = "@sha256:" + "ab" * 32


def evaluate(text, **context):
    environment = celpy.Environment()
    program = environment.program(environment.compile(text))
    return bool(program.evaluate({name: celpy.json_to_cel(each) for name, each in context.items()}))


def only(kind, name=None):
    rendered = chart.objects({"controller": {"enabled": True}})
    (found,) = [
        each
        for each in rendered
        if each["kind"] == kind and name in (None, each["metadata"]["name"])
    ]
    return found


def node_identity():
    """The driver on a node writes its own node's object and no other; others are not its business."""
    spec = only("ValidatingAdmissionPolicy")["spec"]
    (condition,) = [each["expression"] for each in spec["matchConditions"]]
    (validation,) = [each["expression"] for each in spec["validations"]]
    own = {"username": ACCOUNT, "extra": {NODE_NAME: ["worker-1"]}}
    cases = [
        (own, "worker-1", True),
        (own, "worker-2", False),
        ({"username": ACCOUNT, "extra": {}}, "worker-1", False),
        ({"username": ACCOUNT, "extra": {"authentication.kubernetes.io/pod-name": ["p"]}}, "p", False),
        ({"username": ACCOUNT}, "worker-1", False),
    ]
    for user, name, allowed in cases:
        request = {"userInfo": user, "name": name}
        if not evaluate(condition, request=request):
            yield f"the policy is not for {user}"
        elif evaluate(validation, request=request) != allowed:
            yield f"{user} and {name}: {not allowed}"
    for other in (ACCOUNT + "-fleet", "system:serviceaccount:other:csi-driver-oci", "admin"):
        if evaluate(condition, request={"userInfo": {"username": other}, "name": "worker-1"}):
            yield f"the policy is for {other}"
    # Who is bound is who is meant.
    binding = only("ClusterRoleBinding", "csi-driver-oci-fleet-nodes")
    (subject,) = binding["subjects"]
    if f"system:serviceaccount:{subject['namespace']}:{subject['name']}" != ACCOUNT:
        yield f"the rights are those of {subject}"


# Field of a preload's spec -> values, and whether they pass.
VALUES = {
    "reference": [
        ("registry.example.com/team/tool:v1", True),
        ("registry.example.com:5000/team/tool:v1" + DIGEST, True),
        ("[::1]:5000/tool", True),
        ("busybox", True),
        ("registry.example.com/tool@sha256:12", False),
        ("registry.example.com/tool@sha512:" + "ab" * 64, False),
        ("registry.example.com/tool" + DIGEST + DIGEST, False),
        ("registry.example.com/tool:v1 and more", False),
        ("https://registry.example.com/tool?x", False),
        ("", False),
        ("a" * 513, False),
    ],
    "spread": [
        ("10m", True),
        ("1h30m", True),
        ("1.5h", True),
        ("24h", True),
        ("25h", False),
        ("10", False),
        ("-1m", False),
        ("soon", False),
    ],
    "parallelism": [
        (1, True),
        (10000, True),
        ("25%", True),
        ("100%", True),
        (0, False),
        (10001, False),
        ("0%", False),
        ("101%", False),
        ("ten", False),
    ],
    "toleratedNodes": [
        (0, True),
        (10000, True),
        ("0%", True),
        ("100%", True),
        (-1, False),
        (10001, False),
        ("101%", False),
        ("05%", False),
        ("one", False),
    ],
}


def passes(schema, value):
    """As much of a schema as these fields have."""
    if isinstance(value, int):
        return schema["minimum"] <= value <= schema["maximum"]
    if not schema.get("minLength", 0) <= len(value) <= schema["maxLength"]:
        return False
    if not re.search(schema["pattern"], value):
        return False
    rules = schema.get("x-kubernetes-validations", [])
    return all(evaluate(rule["rule"], self=value) for rule in rules)


def preload_values():
    """The definition lets pass what it should, and nothing else."""
    definition = only("CustomResourceDefinition", "artifactpreloads.oci.custom.io")
    (version,) = definition["spec"]["versions"]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    for field, cases in VALUES.items():
        for value, allowed in cases:
            if passes(spec["properties"][field], value) != allowed:
                yield f"{field}: {value!r} is {'refused' if allowed else 'accepted'}"
    if spec["required"] != ["reference"]:
        yield f"{spec['required']} are required"


def rights():
    """Nobody has more rights than are listed here."""
    wanted = {
        "csi-driver-oci-fleet": {
            ("", "nodes", "get list watch"),
            ("", "events", "create"),
            ("", "secrets", "get"),
            ("oci.custom.io", "artifactpreloads", "list watch delete"),
            ("oci.custom.io", "artifactpreloads/status", "patch"),
            ("oci.custom.io", "nodeartifacts", "list watch create patch"),
        },
        "csi-driver-oci-fleet-nodes": {
            ("oci.custom.io", "nodeartifacts", "list watch"),
            ("oci.custom.io", "nodeartifacts/status", "patch"),
        },
    }
    for name, expected in wanted.items():
        found = {
            (group, resource, " ".join(rule["verbs"]))
            for rule in only("ClusterRole", name)["rules"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
        }
        for each in sorted(found ^ expected):
            yield f"{name}: {each}"
    some = chart.objects({"controller": {"enabled": True, "secretNamespaces": ["team"]}})
    cluster = [each for each in some if each["kind"] == "ClusterRole"]
    if any("secrets" in rule["resources"] for role in cluster for rule in role["rules"]):
        yield "with secretNamespaces the controller may read all secrets"
    places = [each["metadata"]["namespace"] for each in some if "-secrets" in each["metadata"]["name"]]
    if places != ["team", "team"]:
        yield f"secrets may be read in {places}"


CHECKS = (node_identity, preload_values, rights)
