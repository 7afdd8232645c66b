"""Compositions without Crossplane: the API server's part (validation, defaults) and the functions' part.

Patch and transform is evaluated here, the subset that our Composition uses; what it does not know is an error, so that
a Composition that grows out of it is noticed. Go templates are evaluated by the real engine, inside of Helm, which has
the same library of functions.

    compose.py COMPOSITION XR.json [OBSERVED.json]

prints what the Composition makes of the object and of what is composed already: name -> desired object.
"""

import copy
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
    if template.count("%s") != len(values):
        raise ValueError(f"{template!r} wants another number of values than {len(values)}")
    return template.replace("%s", "{}").format(*values)


def transformed(value, transforms):
    for transform in transforms:
        only(transform, "type", "string")
        only(transform["string"], "type", "fmt")
        # The function, unlike Crossplane 1, does not default these.
        if transform["type"] != "string" or transform["string"]["type"] != "Format":
            raise ValueError(f"no evaluator of {transform}")
        value = format_text(transform["string"]["fmt"], [value])
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


def patch_and_transform(step, xr, observed):
    """Name -> desired object, and the desired status."""
    only(step, "apiVersion", "kind", "patchSets", "resources")
    sets = {entry["name"]: entry["patches"] for entry in step["patchSets"]}
    desired = {}
    result = {"status": {}}
    for resource in step["resources"]:
        only(resource, "name", "base", "patches")
        target = copy.deepcopy(resource["base"])
        patches = []
        for patch in resource["patches"]:
            if patch["type"] == "PatchSet":
                only(patch, "type", "patchSetName")
                patches += sets[patch["patchSetName"]]
            else:
                patches.append(patch)
        for patch in patches:
            only(patch, "type", "fromFieldPath", "toFieldPath", "combine", "transforms", "policy")
            kind = patch["type"]
            to_composite = kind in ("ToCompositeFieldPath", "CombineToComposite")
            if not to_composite and kind not in ("FromCompositeFieldPath", "CombineFromComposite"):
                raise ValueError(f"no evaluator of {kind}")
            if ("combine" in patch) != kind.startswith("Combine"):
                raise ValueError(f"{kind} with the wrong fields")
            source = observed.get(resource["name"], {}) if to_composite else xr
            try:
                value = patched_value(patch, source)
            except Missing:
                if patch.get("policy", {}).get("fromFieldPath") == "Required":
                    raise
                continue
            put(result if to_composite else target, patch["toFieldPath"], value)
        # A namespaced composite's resources get its namespace.
        target.setdefault("metadata", {})["namespace"] = xr["metadata"]["namespace"]
        desired[resource["name"]] = target
    return desired, result["status"]


# Go templates.

RESOURCE_NAME = "gotemplating.fn.crossplane.io/composition-resource-name"


def go_templating(step, xr, observed):
    """Name -> desired object, and the desired status."""
    only(step, "apiVersion", "kind", "source", "inline")
    if step["source"] != "Inline":
        raise ValueError("no evaluator of other sources")
    template = re.sub(
        r'\(getComposedResource \. ("[^"]+")\)',
        r'(dig "resources" \1 "resource" "" .observed)',
        step["inline"]["template"],
    )
    values = {
        "observed": {
            "composite": {"resource": xr},
            "resources": {name: {"resource": value} for name, value in observed.items()},
        }
    }
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        (path / "templates").mkdir()
        (path / "Chart.yaml").write_text("{apiVersion: v2, name: composition, version: 0.1.0}\n")
        text = "{{- with .Values }}" + template + "{{- end }}\n"
        (path / "templates/all.yaml").write_text(text)
        rendered = chart.texts(values, path=path)["all.yaml"]
    desired, status = {}, {}
    for document in chart.documents(rendered):
        if document["kind"] == xr["kind"]:
            status = document["status"]
            continue
        annotations = document["metadata"].pop("annotations")
        name = annotations.pop(RESOURCE_NAME)
        if annotations:
            document["metadata"]["annotations"] = annotations
        document["metadata"]["namespace"] = xr["metadata"]["namespace"]
        desired[name] = document
    return desired, status


FUNCTIONS = {
    "function-patch-and-transform": patch_and_transform,
    "function-go-templating": go_templating,
}


def composition(name):
    for path in FOLDER.glob("composition*.yaml"):
        document = yaml.safe_load(path.read_text())
        if document["metadata"]["name"] == name:
            return document
    raise KeyError(name)


def compose(name, xr, observed=None):
    """What a Composition makes of an object: name -> desired object, and the desired status."""
    xr = admit(xr)
    pipeline = composition(name)["spec"]["pipeline"]
    if [step["functionRef"]["name"] for step in pipeline[1:]] != ["function-auto-ready"]:
        raise ValueError("the pipeline is one function, and the one that finds out what is ready")
    step = pipeline[0]
    return FUNCTIONS[step["functionRef"]["name"]](step["input"], xr, observed or {})


def preloaded(preload, digest, reason="Ready", before=None):
    """The ArtifactPreload as the controller has it: on all nodes, or not, for a reason, with what was on all before."""
    preload = copy.deepcopy(preload)
    reference = preload["spec"]["reference"]
    ready = reason == "Ready"
    preload["status"] = {
        "reference": reference,
        "digest": digest,
        "conditions": [
            {"type": "Resolved", "status": "True", "reason": "Resolved", "message": "it is there"},
            {"type": "Ready", "status": str(ready), "reason": reason, "message": "said by a test"},
        ],
    }
    last = f"{reference.partition('@')[0]}@{digest}" if ready else before
    if last:
        preload["status"]["readyReference"] = last
    return preload


if __name__ == "__main__":
    name, *files = sys.argv[1:]
    desired, _ = compose(name, *(json.loads(pathlib.Path(file).read_text()) for file in files))
    print(json.dumps(desired))
