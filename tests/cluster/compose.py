"""Compositions without Crossplane: the API server's part (validation, defaults), the functions' part and Crossplane's.

The functions are evaluated as their real versions behave (deploy/crossplane/functions.yaml names them): patch and
transform in the subset that our Composition uses, where what is not known is an error; Go templates by the real engine,
inside of Helm, which has the same library of functions; and what function-auto-ready counts as ready, kind by kind.

    compose.py COMPOSITION XR.json [OBSERVED.json]

prints what the Composition makes of the object and of what is composed already: `desired` has name -> object, `status` the
object's, and `conditions` the status and message of each.

    compose.py

composes the example with each Composition, as if everything composed ran at once, and fails with the message of the
condition Ready where that does not become True.
"""

import copy
import dataclasses
import json
import pathlib
import re
import sys
import tempfile

import jsonschema
import yaml

import chart

FOLDER = chart.ROOT / "deploy/crossplane"
XRD = yaml.safe_load((FOLDER / "xrd.yaml").read_text())


class Rejected(Exception):
    """What the API server says about an object of the new API."""


class Fatal(Exception):
    """A fatal result of a function, which ends the pipeline."""


@dataclasses.dataclass
class State:
    """What one function of a pipeline hands to the next.

    `ready` has True, False, or None where no function has said anything, as `ready` of a desired resource does.
    """

    desired: dict = dataclasses.field(default_factory=dict)
    ready: dict = dataclasses.field(default_factory=dict)
    status: dict = dataclasses.field(default_factory=dict)
    composite_ready: bool | None = None


@dataclasses.dataclass
class Result:
    """What Crossplane makes of one reconciliation; `conditions` has type -> (status, message)."""

    desired: dict
    status: dict
    conditions: dict


# The API server.


def closed(schema):
    """The schema as `kubectl apply --validate=strict` holds an object against it: what it does not name is wrong."""
    schema = {
        key: value
        for key, value in schema.items()
        if not key.startswith("x-kubernetes") and key != "default"
    }
    if "properties" in schema:
        schema["properties"] = {
            key: closed(value) for key, value in schema["properties"].items()
        }
        schema.setdefault("additionalProperties", False)
    return schema


def with_defaults(schema, value):
    if schema.get("type") != "object" or "properties" not in schema:
        return value
    value = dict(value)
    for key, child in schema["properties"].items():
        if key not in value and "default" in child:
            value[key] = copy.deepcopy(child["default"])
        if key in value:
            value[key] = with_defaults(child, value[key])
    return value


def admit(xr):
    """The object as it is stored."""
    schema = XRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    named = closed(schema)
    named["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {}}
    # Crossplane's own part of the specification.
    named["properties"]["spec"]["properties"]["crossplane"] = {}
    try:
        jsonschema.Draft202012Validator(named).validate(xr)
    except jsonschema.ValidationError as error:
        path = ".".join(str(part) for part in error.absolute_path)
        raise Rejected(f"{path}: {error.message}") from error
    return with_defaults(schema, xr)


# Patch and transform.


class Missing(Exception):
    """A field that is not there."""


def segments(path):
    """`a.b["c.d"][0]` -> ["a", "b", "c.d", 0]"""
    found = []
    rest = path
    while rest:
        match = re.match(r'\.?([A-Za-z0-9_$/-]+)|\["([^"]+)"\]|\[([0-9]+)\]', rest)
        if not match:
            raise ValueError(f"{path} is not a field path")
        name, quoted, index = match.groups()
        found.append(int(index) if index is not None else name or quoted)
        rest = rest[match.end() :]
    return found


def get(value, path):
    for part in segments(path):
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError) as error:
            raise Missing(path) from error
    return value


def put(value, path, new):
    parts = segments(path)
    for part, following in zip(parts, parts[1:]):
        empty = [] if isinstance(following, int) else {}
        if isinstance(part, int):
            # The function would fill a hole with nothing; ours have none.
            if part == len(value):
                value.append(empty)
            value = value[part]
        else:
            value = value.setdefault(part, empty)
    value[parts[-1]] = new


def only(mapping, *known):
    unknown = set(mapping) - set(known)
    if unknown:
        raise ValueError(f"no evaluator of {', '.join(sorted(unknown))}")


def format_text(template, values):
    parts = template.split("%s")
    if len(parts) - 1 != len(values):
        raise ValueError(f"{template!r} wants another number of values than {len(values)}")
    if "%" in "".join(parts):
        raise ValueError(f"{template!r} has a verb that has no evaluator")
    return parts[0] + "".join(str(value) + part for value, part in zip(values, parts[1:]))


def go_json(value):
    """JSON as Go writes it: for HTML, and otherwise in UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def transformed(value, transforms):
    for transform in transforms:
        only(transform, "type", "string")
        only(transform["string"], "type", "fmt", "convert", "replace")
        # The function, unlike Crossplane 1, does not default these.
        if transform["type"] != "string":
            raise ValueError(f"no evaluator of {transform}")
        if transform["string"]["type"] == "Format":
            value = format_text(transform["string"]["fmt"], [value])
        elif transform["string"]["type"] == "Replace":
            replace = transform["string"]["replace"]
            only(replace, "search", "replace")
            value = str(value).replace(replace["search"], replace["replace"])
        elif transform["string"]["type"] == "Convert" and transform["string"]["convert"] == "ToJson":
            value = go_json(value)
        else:
            raise ValueError(f"no evaluator of {transform}")
    return value


def patched_value(patch, source):
    if "combine" in patch:
        combine = patch["combine"]
        only(combine, "strategy", "variables", "string")
        if combine["strategy"] != "string":
            raise ValueError("no evaluator of this strategy")
        values = [get(source, variable["fromFieldPath"]) for variable in combine["variables"]]
        value = format_text(combine["string"]["fmt"], values)
    else:
        value = get(source, patch["fromFieldPath"])
    return transformed(copy.deepcopy(value), patch.get("transforms", []))


def condition_is_true(document, kind):
    """Whether a condition is True, whatever generation it is about: the real functions do not compare that either."""
    conditions = document.get("status", {}).get("conditions", [])
    return any(each["type"] == kind and each["status"] == "True" for each in conditions)


def passes_readiness_check(check, document):
    """One of the checks of patch and transform."""
    only(check, "type", "fieldPath", "matchString", "matchInteger", "matchCondition")
    kind = check["type"]
    if kind == "None":
        return True
    if kind == "MatchCondition":
        wanted = check["matchCondition"]
        conditions = document.get("status", {}).get("conditions", [])
        found = [each["status"] for each in conditions if each["type"] == wanted["type"]]
        return found[:1] == [wanted["status"]]
    try:
        value = get(document, check["fieldPath"])
    except Missing:
        return False
    expected = {
        "NonEmpty": value,
        "MatchTrue": True,
        "MatchFalse": False,
        "MatchString": check.get("matchString"),
        "MatchInteger": check.get("matchInteger"),
    }
    return value == expected[kind]


def patch_and_transform(step, xr, observed, state):
    only(step, "apiVersion", "kind", "patchSets", "resources")
    sets = {entry["name"]: entry["patches"] for entry in step["patchSets"]}
    for resource in step["resources"]:
        only(resource, "name", "base", "patches", "readinessChecks")
        name = resource["name"]
        target = copy.deepcopy(resource["base"])
        exists = name in observed
        ready = None
        if exists:
            for field in ("namespace", "name"):
                put(target, f"metadata.{field}", observed[name]["metadata"][field])
            # Without any check it is the condition Ready. False is left open, for the next function to say.
            checks = resource.get("readinessChecks") or [
                {"type": "MatchCondition", "matchCondition": {"type": "Ready", "status": "True"}}
            ]
            if all(passes_readiness_check(check, observed[name]) for check in checks):
                ready = True
        patches = []
        for patch in resource["patches"]:
            if patch["type"] == "PatchSet":
                only(patch, "type", "patchSetName")
                patches += sets[patch["patchSetName"]]
            else:
                patches.append(patch)
        try:
            for patch in patches:
                apply_patch(patch, target, xr, observed.get(name, {}), exists, state)
        except Missing:
            # It is not created before what it requires is there.
            state.composite_ready = False
            continue
        state.desired[name] = target
        state.ready[name] = ready


def apply_patch(patch, target, xr, observed, exists, state):
    only(patch, "type", "fromFieldPath", "toFieldPath", "combine", "transforms", "policy")
    kind = patch["type"]
    to_composite = kind in ("ToCompositeFieldPath", "CombineToComposite")
    if not to_composite and kind not in ("FromCompositeFieldPath", "CombineFromComposite"):
        raise ValueError(f"no evaluator of {kind}")
    if ("combine" in patch) != kind.startswith("Combine"):
        raise ValueError(f"{kind} with the wrong fields")
    try:
        value = patched_value(patch, observed if to_composite else xr)
    except Missing:
        # Of what exists already, a required field is as good as an optional one.
        required = patch.get("policy", {}).get("fromFieldPath") == "Required"
        if required and not to_composite and not exists:
            raise
        return
    put({"status": state.status} if to_composite else target, patch["toFieldPath"], value)


# Go templates.

PREFIX = "gotemplating.fn.crossplane.io/"
RESOURCE_NAME = PREFIX + "composition-resource-name"
READY = PREFIX + "ready"
READINESS = {"True": True, "False": False, "Unspecified": None}


def request(xr, observed, state):
    """The function's request, as a template sees it: empty maps are left out."""
    ready = {True: "READY_TRUE", False: "READY_FALSE", None: "READY_UNSPECIFIED"}
    values = {"observed": {"composite": {"resource": xr}}, "desired": {}}
    if observed:
        values["observed"]["resources"] = {
            name: {"resource": document} for name, document in observed.items()
        }
    if state.desired:
        values["desired"]["resources"] = {
            name: {"resource": document, "ready": ready[state.ready[name]]}
            for name, document in state.desired.items()
        }
    if state.status:
        values["desired"]["composite"] = {"resource": {"status": state.status}}
    return values


def render_template(template, values):
    template = re.sub(
        r'\(getComposedResource \. ("[^"]+")\)',
        r'(dig "resources" \1 "resource" "" .observed)',
        template,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        (path / "templates").mkdir()
        (path / "Chart.yaml").write_text("{apiVersion: v2, name: composition, version: 0.1.0}\n")
        text = "{{- with .Values }}" + template + "{{- end }}\n"
        (path / "templates/all.yaml").write_text(text)
        return chart.texts(values, path=path)["all.yaml"]


def merge_status(into, new):
    """As the function merges: what is empty in the new one changes nothing."""
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge_status(into[key], value)
        elif value or key not in into:
            into[key] = value


def go_templating(step, xr, observed, state):
    only(step, "apiVersion", "kind", "source", "inline")
    if step["source"] != "Inline":
        raise ValueError("no evaluator of other sources")
    rendered = render_template(step["inline"]["template"], request(xr, observed, state))
    for document in chart.documents(rendered):
        annotations = document.setdefault("metadata", {}).get("annotations") or {}
        for key, value in annotations.items():
            if not isinstance(value, str):
                raise Fatal(f"invalid annotations in {document['kind']}: {key} is no string")
        name, said = annotations.pop(RESOURCE_NAME, None), annotations.pop(READY, "Unspecified")
        if said not in READINESS:
            raise Fatal(f"invalid {READY!r} annotation value {said!r}")
        if not annotations:
            document["metadata"].pop("annotations", None)
        same_kind = [document[key] for key in ("apiVersion", "kind")] == [xr["apiVersion"], xr["kind"]]
        if same_kind and name is None:
            if READINESS[said] is not None:
                raise ValueError("readiness of the object itself comes with a newer version only")
            merge_status(state.status, document.get("status") or {})
            continue
        if name is None:
            raise Fatal(f"{document['kind']!r} template is missing required {RESOURCE_NAME!r} annotation")
        state.desired[name] = document
        state.ready[name] = READINESS[said]


# What is ready by itself.


def statefulset_is_healthy(document):
    status = document.get("status", {})
    replicas = document["spec"].get("replicas", 1)
    # The API server leaves out readyReplicas of none: with replicas: 0 it is never healthy.
    if any(status.get(field) != replicas for field in ("readyReplicas", "currentReplicas")):
        return False
    revision = status.get("currentRevision")
    return revision is not None and revision == status.get("updateRevision")


def service_is_healthy(document):
    if document["spec"].get("type", "ClusterIP") != "LoadBalancer":
        return True
    return bool(document.get("status", {}).get("loadBalancer", {}).get("ingress"))


def exists(_):
    return True


# The kinds that function-auto-ready 0.6.3 knows. What is None here it knows too, and this evaluator does not.
# Role, RoleBinding and every kind of another group are not among them.
HEALTH = {
    ("v1", "ConfigMap"): exists,
    ("v1", "Secret"): exists,
    ("v1", "ServiceAccount"): exists,
    ("v1", "Namespace"): exists,
    ("v1", "Service"): service_is_healthy,
    ("apps/v1", "StatefulSet"): statefulset_is_healthy,
    ("v1", "PersistentVolumeClaim"): lambda each: each.get("status", {}).get("phase") == "Bound",
    ("batch/v1", "Job"): lambda each: condition_is_true(each, "Complete"),
    # With any other restartPolicy but Always, which no Pod of ours has.
    ("v1", "Pod"): lambda each: each.get("status", {}).get("phase") == "Succeeded",
    ("apps/v1", "Deployment"): None,
    ("apps/v1", "DaemonSet"): None,
    ("apps/v1", "ReplicaSet"): None,
    ("batch/v1", "CronJob"): None,
    ("networking.k8s.io/v1", "Ingress"): None,
    ("autoscaling/v2", "HorizontalPodAutoscaler"): None,
}


def auto_ready(_step, _xr, observed, state):
    """What another function has said stays; what does not exist is left open, and so unready."""
    for name in state.desired:
        if state.ready[name] is not None or name not in observed:
            continue
        document = observed[name]
        key = (document["apiVersion"], document["kind"])
        check = HEALTH.get(key, lambda _: False)
        if check is None:
            raise ValueError(f"no evaluator of the health of {' '.join(key)}")
        if check(document) or condition_is_true(document, "Ready"):
            state.ready[name] = True


FUNCTIONS = {
    "function-patch-and-transform": patch_and_transform,
    "function-go-templating": go_templating,
    "function-auto-ready": auto_ready,
}


# Crossplane.


def composition(name):
    for path in FOLDER.glob("composition*.yaml"):
        document = yaml.safe_load(path.read_text())
        if document["metadata"]["name"] == name:
            return document
    raise KeyError(name)


def names_of(resources):
    """As Crossplane names them in a message: the first three, and how many more."""
    resources = sorted(resources)
    more = len(resources) - 3
    return ", ".join(resources[:3] + ([f"and {more} more"] if more > 0 else []))


def reconcile(name, xr, observed=None):
    """One reconciliation of an object, with what is composed of it already."""
    xr = admit(xr)
    observed = observed or {}
    state = State()
    for step in composition(name)["spec"]["pipeline"]:
        only(step, "step", "functionRef", "input")
        function = FUNCTIONS[step["functionRef"]["name"]]
        try:
            function(step.get("input"), xr, observed, state)
        except Fatal as error:
            message = f"pipeline step {step['step']!r} returned a fatal result: {error}"
            # Ready stays as it was.
            return Result({}, {}, {"Synced": (False, message)})
    for document in state.desired.values():
        # A namespaced composite's resources get its namespace.
        document.setdefault("metadata", {})["namespace"] = xr["metadata"]["namespace"]
    unready = names_of(each for each in state.desired if not state.ready[each])
    ready = (not unready, f"Unready resources: {unready}" if unready else "")
    if state.composite_ready is not None:
        ready = (state.composite_ready, "")
    conditions = {"Synced": (True, ""), "Ready": ready}
    return Result(state.desired, state.status, conditions)


def compose(name, xr, observed=None):
    """What a Composition makes of an object: name -> desired object, and the desired status."""
    result = reconcile(name, xr, observed)
    synced, message = result.conditions["Synced"]
    if not synced:
        raise ValueError(f"{name}: {message}")
    return result.desired, result.status


# What the controller says of a few reasons, about {what} of a registry.
MESSAGES = {
    "Ready": "2 of 2 nodes hold it",
    "Preloading": "0 of 2 nodes hold it, 1 fetch it, 1 wait, 0 failed",
    "ReferenceNotFound": "the registry has no {what}: check the reference and that it was pushed",
    "RegistryUnavailable": "{host} cannot be reached for {what} (Connection refused (os error 111)): check the network, DNS and proxy",
}


# What it adds while the registry is down, to an answer of before.
EARLIER = (
    "; the registry has not answered since 2026-11-29T10:00:00Z, this is its answer of 2026-11-28T10:00:00Z"
)


def preloaded(preload, digest, reason="Ready", before=None, earlier=False):
    """The ArtifactPreload as the controller has it: on all nodes, or not, for a reason, with what was on all before."""
    preload = copy.deepcopy(preload)
    reference = preload["spec"]["reference"]
    ready = reason == "Ready"
    generation = preload["metadata"].setdefault("generation", 1)
    repository, _, version = reference.partition("@")[0].rpartition(":")
    what = f"manifest {version} of {repository}"
    message = MESSAGES.get(reason, "why").format(what=what, host=repository.partition("/")[0])
    preload["status"] = {
        "observedGeneration": generation,
        "reference": reference,
        "digest": digest,
        "conditions": [
            {"type": "Resolved", "status": "True", "reason": "Resolved", "message": "it is there"},
            {"type": "Ready", "status": str(ready), "reason": reason, "message": message + (EARLIER if earlier else "")},
        ],
    }
    last = f"{reference.partition('@')[0]}@{digest}" if ready else before
    if last:
        preload["status"]["readyReference"] = last
    return preload


def main(arguments):
    if not arguments:
        # Not at the head: it composes too.
        import story

        raise SystemExit("\n".join(story.never_ready()) or 0)
    name, *files = arguments
    result = reconcile(name, *(json.loads(pathlib.Path(file).read_text()) for file in files))
    print(json.dumps(dataclasses.asdict(result)))


if __name__ == "__main__":
    main(sys.argv[1:])
