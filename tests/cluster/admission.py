"""The ValidatingAdmissionPolicy, its expressions evaluated as the API server evaluates them."""

import celpy

import chart

DIGEST = "@sha256:" + "ab" * 32
ALLOWED = ["registry.example.com/team", "registry.example.org"]


def policy(**values):
    rendered = chart.objects({"admissionPolicy": {"enabled": True, **values}})
    (found,) = [each for each in rendered if each["kind"] == "ValidatingAdmissionPolicy"]
    return found["spec"]


def join(texts, separator):
    """Of Kubernetes' library for strings, which the evaluator lacks."""
    return celpy.celtypes.StringType(separator.join(texts))


def split(text, separator):
    parts = [celpy.celtypes.StringType(part) for part in text.split(separator)]
    return celpy.celtypes.ListType(parts)


def substring(text, start):
    return celpy.celtypes.StringType(text[start:])


FUNCTIONS = {"join": join, "split": split, "substring": substring}


class Evaluator:
    """Validations and variables of one policy, compiled once."""

    def __init__(self, spec):
        environment = celpy.Environment()

        def program(text):
            return environment.program(environment.compile(text), functions=FUNCTIONS)

        self.variables = [
            (each["name"], program(each["expression"])) for each in spec["variables"]
        ]
        self.validations = [
            (
                program(each["expression"]),
                program(each["messageExpression"])
                if "messageExpression" in each
                else each["message"],
            )
            for each in spec["validations"]
        ]

    def refusals(self, document):
        context = {"object": celpy.json_to_cel(document), "variables": celpy.json_to_cel({})}
        for name, program in self.variables:
            context["variables"][celpy.celtypes.StringType(name)] = program.evaluate(context)
        for validation, message in self.validations:
            if not validation.evaluate(context):
                yield message if isinstance(message, str) else str(message.evaluate(context))


def pod_spec(*attributes, driver="oci.custom.io"):
    volumes = [
        {"name": f"v{index}", "csi": {"driver": driver, "volumeAttributes": each}}
        for index, each in enumerate(attributes)
    ]
    return {"containers": [], "volumes": [{"name": "other", "emptyDir": {}}, *volumes]}


def carriers(attributes):
    """Every kind of object that a volume can come in."""
    pod = pod_spec(attributes)
    yield {"kind": "Pod", "spec": pod}
    for kind in ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job"):
        yield {"kind": kind, "spec": {"template": {"spec": pod}}}
    yield {"kind": "CronJob", "spec": {"jobTemplate": {"spec": {"template": {"spec": pod}}}}}
    csi = {"driver": "oci.custom.io", "volumeHandle": "x", "volumeAttributes": attributes}
    yield {"kind": "PersistentVolume", "spec": {"csi": csi}}
    # It has a reference and nothing else to name an artifact by.
    if list(attributes) == ["reference"]:
        yield {"kind": "ArtifactPreload", "spec": attributes}


def listed(*lines):
    return {"artifacts": "".join(f"{line}\n" for line in lines)}


GOOD = "- reference: registry.example.com/team/tool:v1"
EVIL = "- reference: evil.org/tool:v1"
# Lists in other words than the policy reads, of references that it allows and of others.
SPELLINGS = [
    {"artifacts": '[{"reference": "registry.example.com/team/tool:v1"}]'},
    {"artifacts": '[{"reference": "evil.org/tool:v1"}]'},
    listed(GOOD, "- {reference: evil.org/tool:v1}"),
    listed(GOOD, "-  reference: evil.org/tool:v1"),
    listed(GOOD, "- path: x", "  reference: evil.org/tool:v1"),
    listed(GOOD, "- reference: 'evil.org/tool:v1'"),
    listed(GOOD, "- reference:", "    evil.org/tool:v1"),
    listed(GOOD, "- reference: &a registry.example.com/team", "- reference: *a"),
    listed(GOOD, "  <<: {reference: evil.org/tool:v1}"),
    listed(GOOD, "  reference: evil.org/tool:v1"),
    listed(GOOD, '  "path": x'),
    listed(GOOD + "\r- reference: evil.org/tool:v1"),
    listed(GOOD, "  path: x\u2028- reference: evil.org/tool:v1"),
    listed("---", GOOD),
    listed(GOOD, ""),
]
# Attributes -> whether the repositories allow them.
REPOSITORIES = [
    (listed(GOOD), True),
    (listed(GOOD, "  path: a", "  include: 'x/**,y'", GOOD, "  strip: b", "  exclude: c"), True),
    ({"artifacts": GOOD}, True),
    ({"artifacts": "", "reference": "registry.example.org/anything:v1"}, True),
    (listed(EVIL), False),
    (listed(GOOD, "  path: a", EVIL), False),
    # YAML takes the second reference for text, and the policy is not less strict for it.
    (listed(GOOD, '  path: "a', EVIL, '  path: b"'), False),
    *((attributes, False) for attributes in SPELLINGS),
    ({"reference": "registry.example.com/team/tool:v1"}, True),
    ({"reference": "registry.example.com/team:v1"}, True),
    ({"reference": "registry.example.com/team" + DIGEST}, True),
    ({"reference": "registry.example.com/team"}, True),
    ({"repository": "registry.example.com/team/tool", "tag": "v1"}, True),
    ({"reference": "registry.example.org/anything:v1"}, True),
    ({"reference": "", "repository": "registry.example.org/anything"}, True),
    ({"reference": "registry.example.com/teams/tool:v1"}, False),
    ({"reference": "registry.example.com/other:v1"}, False),
    ({"reference": "registry.example.com.evil.org/team/tool:v1"}, False),
    ({"reference": "registry.example.org:5000/anything:v1"}, False),
    ({"reference": "registry.example.org@evil.org/anything:v1"}, False),
    ({"reference": "evil.org/registry.example.com/team/tool:v1"}, False),
    ({"reference": "docker.io/library/busybox"}, False),
    ({"reference": "busybox"}, False),
    ({"repository": "evil.org/tool"}, False),
    # The driver refuses two names; the policy must not look at the harmless one only.
    ({"reference": "registry.example.com/team:v1", "repository": "evil.org/tool"}, False),
]
# Attributes -> whether they are pinned.
DIGESTS = [
    (listed(GOOD + DIGEST, "  path: a", GOOD + DIGEST, "  path: b"), True),
    (listed(GOOD + DIGEST, "  path: a", GOOD, "  path: b"), False),
    ({"artifacts": f'[{{"reference": "registry.example.com/a{DIGEST}"}}]'}, False),
    ({"reference": "registry.example.com/a:v1" + DIGEST}, True),
    ({"reference": "registry.example.com/a" + DIGEST}, True),
    ({"repository": "registry.example.com/a", "digest": DIGEST[1:]}, True),
    ({"repository": "registry.example.com/a", "tag": "v1"}, False),
    ({"repository": "registry.example.com/a", "digest": ""}, False),
    ({"reference": "registry.example.com/a:v1"}, False),
    ({}, False),
]


def admission():
    """The policy refuses what it should and nothing else, in every kind of object, and says what."""
    for values, cases in (
        ({"repositories": ALLOWED}, REPOSITORIES),
        ({"requireDigest": True}, DIGESTS),
    ):
        evaluator = Evaluator(policy(**values))
        for attributes, allowed in cases:
            for document in carriers(attributes):
                refusals = list(evaluator.refusals(document))
                if bool(refusals) == allowed:
                    yield f"{document['kind']} with {attributes}: {refusals or 'allowed'}"
        for harmless in (
            {"kind": "Pod", "spec": {"containers": []}},
            {"kind": "Pod", "spec": pod_spec({"reference": "evil.org/a"}, driver="other")},
            {"kind": "PersistentVolume", "spec": {"nfs": {"server": "s", "path": "/"}}},
        ):
            for refusal in evaluator.refusals(harmless):
                yield f"{harmless} is refused: {refusal}"
    both = Evaluator(policy(repositories=ALLOWED, requireDigest=True))
    right = {"reference": "registry.example.org/a" + DIGEST}
    document = {"kind": "Pod", "spec": pod_spec(right, {"reference": "evil.org/a:v1"})}
    said = " ".join(both.refusals(document))
    if "evil.org/a:v1" not in said or "by digest" not in said:
        yield f"the refusal of one volume among two says {said!r}"
    kinds = {resource for rule in policy_rules() for resource in rule["resources"]}
    if "artifactpreloads" not in kinds or "persistentvolumes" not in kinds:
        yield f"the policy is asked about {sorted(kinds)} only"


def policy_rules():
    return policy(requireDigest=True)["matchConstraints"]["resourceRules"]
