"""The policy that bounds what the driver on a node may change about nodes."""

import copy

import celpy

import chart

ACCOUNT = "system:serviceaccount:csi-driver-oci:csi-driver-oci"
NODE_NAME = "authentication.kubernetes.io/node-name"
OURS = {"key": "oci.custom.io/agent-not-ready", "effect": "NoExecute"}
OTHER = {"key": "other.example.com/not-ready", "effect": "NoSchedule"}
NODE = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {
        "name": "worker-1",
        "uid": "5e8f",
        "resourceVersion": "7",
        "labels": {"pool": "tools"},
        "managedFields": [{"manager": "kubelet"}],
    },
    "spec": {"providerID": "cloud://worker-1", "taints": [OTHER, OURS, OURS | {"effect": "NoSchedule"}]},
}


def changed(change):
    """The node after a change of a copy of it."""
    node = copy.deepcopy(NODE)
    change(node)
    return node


def untainted(node):
    node["spec"]["taints"] = [OTHER]
    # The API server notes who has changed what.
    node["metadata"]["managedFields"] = [{"manager": "csi-driver-oci"}]


def with_others(change):
    """A change that comes together with the one that is allowed."""

    def both(node):
        untainted(node)
        change(node)

    return both


# What is done to the node -> a part of the refusal, or nothing where it is allowed.
CHANGES = [
    ("the taint is removed", untainted, None),
    ("nothing is changed", lambda node: None, "remove the taint"),
    ("one of two effects is left", lambda node: node["spec"]["taints"].pop(), "remove the taint"),
    ("all taints are removed", lambda node: node["spec"].pop("taints"), "remove the taint"),
    (
        "another taint is removed",
        lambda node: node["spec"]["taints"].remove(OTHER),
        "remove the taint",
    ),
    (
        "a taint is added",
        with_others(lambda node: node["spec"]["taints"].append({"key": "x", "effect": "NoExecute"})),
        "remove the taint",
    ),
    (
        "another taint is changed",
        with_others(lambda node: node["spec"].update(taints=[OTHER | {"effect": "NoExecute"}])),
        "remove the taint",
    ),
    ("it is cordoned", with_others(lambda node: node["spec"].update(unschedulable=True)), "spec"),
    ("its provider is changed", with_others(lambda node: node["spec"].update(providerID="x")), "spec"),
    ("its provider is removed", with_others(lambda node: node["spec"].pop("providerID")), "spec"),
    ("a field of the future", with_others(lambda node: node["spec"].update(someNewField={})), "spec"),
    (
        "a label is changed",
        with_others(lambda node: node["metadata"]["labels"].update(pool="control-plane")),
        "metadata",
    ),
    ("labels are removed", with_others(lambda node: node["metadata"].pop("labels")), "metadata"),
    (
        "annotations are added",
        with_others(lambda node: node["metadata"].update(annotations={"a": "b"})),
        "metadata",
    ),
    (
        "a finalizer is added",
        with_others(lambda node: node["metadata"].update(finalizers=["example.com/x"])),
        "metadata",
    ),
]
# Who asks -> whether that is the driver on this node.
USERS = [
    ({"username": ACCOUNT, "extra": {NODE_NAME: ["worker-1"]}}, True),
    ({"username": ACCOUNT, "extra": {NODE_NAME: ["worker-2"]}}, False),
    ({"username": ACCOUNT, "extra": {"authentication.kubernetes.io/pod-name": ["worker-1"]}}, False),
    ({"username": ACCOUNT, "extra": {}}, False),
    ({"username": ACCOUNT}, False),
]


def policy():
    rendered = chart.objects({"startupTaint": {"enabled": True}})
    (found,) = [each for each in rendered if each["kind"] == "ValidatingAdmissionPolicy"]
    return found["spec"]


class Evaluator:
    """The policy's expressions, compiled once."""

    def __init__(self, spec, before=NODE):
        self.before = celpy.json_to_cel(before)
        environment = celpy.Environment()

        def program(text):
            return environment.program(environment.compile(text))

        (self.condition,) = [program(each["expression"]) for each in spec["matchConditions"]]
        self.variables = [(each["name"], program(each["expression"])) for each in spec["variables"]]
        self.validations = [
            (program(each["expression"]), each["message"]) for each in spec["validations"]
        ]

    def is_for(self, user):
        request = celpy.json_to_cel({"userInfo": user, "name": "worker-1"})
        return bool(self.condition.evaluate({"request": request}))

    def refusals(self, user, node, operation="UPDATE", sub_resource=""):
        request = {
            "userInfo": user,
            "name": "worker-1",
            "operation": operation,
        }
        # Left out of a request for the object itself.
        if sub_resource:
            request["subResource"] = sub_resource
        context = {
            "request": celpy.json_to_cel(request),
            "object": celpy.json_to_cel(node),
            "oldObject": self.before,
            "variables": celpy.json_to_cel({}),
        }
        for name, program in self.variables:
            context["variables"][celpy.celtypes.StringType(name)] = program.evaluate(context)
        return [said for program, said in self.validations if not program.evaluate(context)]


def startup_taint():
    """The driver on a node removes its taint from its own node, and changes nothing else."""
    evaluator = Evaluator(policy())
    own = USERS[0][0]
    for name, change, refusal in CHANGES:
        said = " ".join(evaluator.refusals(own, changed(change)))
        if bool(said) != bool(refusal) or (refusal or "") not in said:
            yield f"{name}: {said or 'allowed'}"
    for user, allowed in USERS:
        if not evaluator.is_for(user):
            yield f"the policy is not for {user}"
        said = evaluator.refusals(user, changed(untainted))
        if bool(said) == allowed:
            yield f"{user}: {said or 'allowed'}"
    for operation, sub_resource in (("CREATE", ""), ("UPDATE", "status")):
        if not evaluator.refusals(own, changed(untainted), operation, sub_resource):
            yield f"{operation} of nodes/{sub_resource} is allowed"
    for other in ("kubernetes-admin", "system:node:worker-1", ACCOUNT + "-fleet"):
        if evaluator.is_for({"username": other}):
            yield f"the policy is for {other}"
    rendered = chart.objects({"startupTaint": {"enabled": True}, "driverName": "other.example.com"})
    if "other.example.com/agent-not-ready" not in str(rendered):
        yield "the taint of another driver's name is not in the policy"


CHECKS = (startup_taint,)
