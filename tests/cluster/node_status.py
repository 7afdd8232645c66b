"""The policy that bounds what the controller may change about nodes."""

import copy

import chart
from startup_taint import Evaluator

ACCOUNT = "system:serviceaccount:csi-driver-oci:csi-driver-oci-fleet"
LABEL = "oci.custom.io/ready." + "0a" * 16
OLD_LABEL = "oci.custom.io/ready." + "1b" * 16
CONDITION = "oci.custom.io/ArtifactsReady"
READY = {"type": "Ready", "status": "True", "reason": "KubeletReady"}
PRESSURE = {"type": "DiskPressure", "status": "False", "reason": "KubeletHasNoDiskPressure"}
NODE = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {
        "name": "worker-1",
        "uid": "5e8f",
        "resourceVersion": "7",
        "labels": {"pool": "tools", OLD_LABEL: "true"},
        "annotations": {"a": "b"},
        "managedFields": [{"manager": "kubelet"}],
    },
    "spec": {"taints": [{"key": "other.example.com/not-ready", "effect": "NoSchedule"}]},
    "status": {
        "conditions": [READY, PRESSURE],
        "capacity": {"cpu": "2"},
        "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}],
    },
}


def allowed(node):
    """What the controller writes."""
    node["metadata"]["labels"].pop(OLD_LABEL, None)
    node["metadata"]["labels"][LABEL] = "true"
    node["metadata"]["managedFields"] = [{"manager": "csi-driver-oci-controller"}]
    node["status"]["conditions"].append({"type": CONDITION, "status": "True", "reason": "ArtifactsReady"})


def with_others(change):
    """A change that comes together with the one that is allowed."""

    def both(node):
        allowed(node)
        change(node)

    return both


def label(key, value):
    return with_others(lambda node: node["metadata"]["labels"].update({key: value}))


def metadata(**fields):
    return with_others(lambda node: node["metadata"].update(fields))


def status(**fields):
    return with_others(lambda node: node["status"].update(fields))


def condition(index, **fields):
    return with_others(lambda node: node["status"]["conditions"][index].update(fields))


LABELS, METADATA, SPEC, STATUS, CONDITIONS = "add and remove the labels", "metadata", "spec", "in the status", "the condition"

# What is done to the node -> a part of the refusal, or nothing where it is allowed.
CHANGES = [
    ("a label and the condition", allowed, None),
    ("nothing", lambda node: None, None),
    ("the condition comes first", with_others(lambda node: node["status"]["conditions"].insert(0, node["status"]["conditions"].pop())), None),
    ("another label", label("pool", "control-plane"), LABELS),
    ("a new label", label("node-role.kubernetes.io/control-plane", ""), LABELS),
    ("a removed label", with_others(lambda node: node["metadata"]["labels"].pop("pool")), LABELS),
    ("no labels", with_others(lambda node: node["metadata"].pop("labels")), LABELS),
    ("another value", label(LABEL, "false"), LABELS),
    ("another form of the label", label("oci.custom.io/ready.x", "true"), LABELS),
    ("a similar label", label("oci.custom.io/readyx" + "0a" * 16, "true"), LABELS),
    ("a label behind the prefix", label("example.com/" + LABEL.partition("/")[2], "true"), LABELS),
    ("a changed annotation", metadata(annotations={"a": "c"}), METADATA),
    ("no annotations", with_others(lambda node: node["metadata"].pop("annotations")), METADATA),
    ("a finalizer", metadata(finalizers=["example.com/x"]), METADATA),
    ("an owner", metadata(ownerReferences=[{"apiVersion": "v1", "kind": "Node", "name": "x", "uid": "1"}]), METADATA),
    ("a taint", with_others(lambda node: node["spec"]["taints"].append({"key": "x", "effect": "NoExecute"})), SPEC),
    ("no taint", with_others(lambda node: node["spec"].pop("taints")), SPEC),
    ("it is cordoned", with_others(lambda node: node["spec"].update(unschedulable=True)), SPEC),
    ("another capacity", status(capacity={"cpu": "64"}), STATUS),
    ("another address", status(addresses=[{"type": "InternalIP", "address": "10.0.0.2"}]), STATUS),
    ("no addresses", with_others(lambda node: node["status"].pop("addresses")), STATUS),
    ("an image", status(images=[{"names": ["x"]}]), STATUS),
    ("it is not ready", condition(0, status="False"), CONDITIONS),
    ("another reason", condition(1, reason="x"), CONDITIONS),
    ("a removed condition", with_others(lambda node: node["status"]["conditions"].pop(1)), CONDITIONS),
    ("a new condition", with_others(lambda node: node["status"]["conditions"].append({"type": "x", "status": "True"})), CONDITIONS),
    ("no conditions", with_others(lambda node: node["status"].pop("conditions")), CONDITIONS),
]  # fmt: skip


def changed(change):
    """The node after a change of a copy of it."""
    node = copy.deepcopy(NODE)
    change(node)
    return node


def objects(**values):
    rendered = chart.objects({"controller": {"enabled": True, **values}})
    return [each for each in rendered if each["metadata"]["name"] == "csi-driver-oci-fleet-node-status"]


def refusals(evaluator, node, operation="UPDATE", sub_resource="status"):
    return " ".join(evaluator.refusals({"username": ACCOUNT}, node, operation, sub_resource))


def node_status():
    """The controller writes its labels and its condition to nodes, and nothing else; no validation is superfluous."""
    role, binding, policy, _ = objects(nodeLabels=True)
    evaluator = Evaluator(policy["spec"], NODE)
    for name, change, refusal in CHANGES:
        said = refusals(evaluator, changed(change))
        if bool(said) != bool(refusal) or (refusal or "") not in said:
            yield f"{name}: {said or 'allowed'}"
    requests = [("CREATE", "status"), ("UPDATE", ""), ("UPDATE", "proxy")]
    for operation, sub_resource in requests:
        if not refusals(evaluator, changed(allowed), operation, sub_resource):
            yield f"{operation} of nodes/{sub_resource} is allowed"
    for at, validation in enumerate(policy["spec"]["validations"]):
        others = [each for index, each in enumerate(policy["spec"]["validations"]) if index != at]
        weaker = Evaluator(policy["spec"] | {"validations": others}, NODE)
        passes = [name for name, change, refusal in CHANGES if refusal and not refusals(weaker, changed(change))]
        passes += [each for each in requests if not refusals(weaker, changed(allowed), *each)]
        if not passes:
            yield f"no case needs {validation['message']!r}"
    for user, is_meant in ((ACCOUNT, True), (ACCOUNT.removesuffix("-fleet"), False), ("system:node:worker-1", False)):
        if evaluator.is_for({"username": user}) != is_meant:
            yield f"the policy is {'not ' if is_meant else ''}for {user}"
    (subject,) = binding["subjects"]
    if f"system:serviceaccount:{subject['namespace']}:{subject['name']}" != ACCOUNT:
        yield f"the rights are those of {subject}"
    if role["rules"] != [{"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]}]:
        yield f"the rights are {role['rules']}"
    if found := objects():
        yield f"without the values there are {found}"
    if len(objects(nodeConditionNamespaces=["platform"])) != 4:
        yield "the condition alone has no rights or no policy"


CHECKS = (node_status,)
