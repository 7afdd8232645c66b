"""The policy that writes a pod's pull secret into its volumes."""

import celpy

import chart

ANNOTATION = "oci.custom.io/pull-secret"
MIRROR = {"kubernetes.io/config.mirror": "x"}


def volume(driver="oci.custom.io", **fields):
    attributes = {"reference": "registry.example.com/team/tool:v1"}
    return {"csi": {"driver": driver, "volumeAttributes": attributes, **fields}}


OURS = volume()
OWN = volume(nodePublishSecretRef={"name": "own"})
OTHER = volume("other.example.com")
SCRATCH = {"emptyDir": {}}
LONGEST = "a" * 253

# What is special about a pod -> its pull secrets, its namespace's annotation, its volumes, and the secret of each then.
CASES = [
    ("two pull secrets", ["first", "second"], None, [SCRATCH, OURS, OTHER, OURS], [None, "first", None, "first"]),
    ("a volume with a secret", ["first"], None, [OWN, OURS], ["own", "first"]),
    ("only volumes with a secret", ["first"], "default", [OWN, OWN], ["own", "own"]),
    ("a secret of the namespace", [], "default", [OTHER, OURS, OWN], [None, "default", "own"]),
    ("both", ["first"], "default", [OURS], ["first"]),
    ("neither", [], None, [OURS, OWN], [None, "own"]),
    ("no volume of the driver", ["first"], "default", [OTHER, SCRATCH], [None, None]),
    ("no volume", ["first"], "default", [], []),
    ("an empty name", ["", "second"], None, [OURS], ["second"]),
    ("only an empty name", [""], "default", [OURS], ["default"]),
    ("names that no secret has", ["Upper", "under_score", "-a", "a-", "a..b", LONGEST + "a", "a.b-c"], None, [OURS], ["a.b-c"]),
    ("the longest name", [LONGEST], None, [OURS], [LONGEST]),
    ("a wrong annotation", [], "two words", [OURS], [None]),
    ("an empty annotation", [], "", [OURS], [None]),
]


def pod(secrets, volumes, **metadata):
    named = [{"name": f"v{index}", **each} for index, each in enumerate(volumes)]
    spec = {"containers": [], "imagePullSecrets": [{"name": name} if name else {} for name in secrets], "volumes": named}
    # The API server leaves empty lists out.
    return {"kind": "Pod", "metadata": metadata, "spec": {key: value for key, value in spec.items() if value or key == "containers"}}


def annotations(secret):
    """Metadata of a namespace whose annotation names this secret; None for one without annotations."""
    return {} if secret is None else {"annotations": {ANNOTATION: secret, "other": "x"}}


def policy(**values):
    rendered = chart.objects({"podPullSecrets": {"enabled": True}, **values})
    (found,) = [each for each in rendered if each["kind"] == "MutatingAdmissionPolicy"]
    return found["spec"]


def pod_pull_secrets():
    """The policy is for pods with a volume that lacks a secret, and finds the right secret, or none."""
    environment, spec = celpy.Environment(), policy()

    def program(each):
        return environment.program(environment.compile(each["expression"]))

    conditions = [program(each) for each in spec["matchConditions"]]
    (secrets,) = [program(each) for each in spec["variables"]]

    def applies(document):
        context = {"object": celpy.json_to_cel(document)}
        return all(condition.evaluate(context) for condition in conditions)

    for name, given, annotation, volumes, expected in CASES:
        document = pod(given, volumes)
        lacking = [secret for each, secret in zip(volumes, expected) if each is OURS]
        if applies(document) != bool(lacking):
            yield f"{name}: the policy is {'not ' if lacking else ''}for it"
        context = {"object": document, "namespaceObject": {"metadata": annotations(annotation)}}
        found = secrets.evaluate({key: celpy.json_to_cel(value) for key, value in context.items()})
        if lacking and [str(each) for each in found[:1]] != [each for each in lacking[:1] if each]:
            yield f"{name}: the secrets are {found}, expected {lacking}"
    if applies(pod([], [OURS], annotations=MIRROR)):
        yield "the policy is for static pods"
    if not applies(pod([], [OURS], annotations={"other": "x"})):
        yield "the policy is not for pods with annotations"
    for text in ("'other.example.com/pull-secret'", "v.csi.driver == 'other.example.com'"):
        if text not in str(policy(driverName="other.example.com")).replace("\\'", "'"):
            yield f"another driver's policy lacks {text}"


CHECKS = (pod_pull_secrets,)
