"""docs/resources.md, made from the definitions of the chart and of deploy/crossplane.

    resources.py --write     makes the page anew
"""

import sys

import yaml

import chart

PAGE = chart.ROOT / "docs/resources.md"
DEFINITIONS = [
    *sorted((chart.CHART / "files/crds").glob("*.yaml")),
    chart.ROOT / "deploy/crossplane/xrd.yaml",
]
HEADER = """<!-- Made from the definitions by make render. -->

# API objects

All fields, from the definitions that the API server validates with. `kubectl explain artifactpreload.spec` shows the
same. [Preloading](preloading.md) and [Prometheus by Crossplane](how-to/prometheus-by-crossplane.md) describe how to use
them.
"""


def cell(text):
    return " ".join(str(text).split()).replace("|", "\\|")


def code(value):
    """A value as YAML would be typed; an empty one says nothing."""
    if value in ({}, [], ""):
        return ""
    return f"`{yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}`".replace("|", "\\|")


def kind_of(schema):
    """The type of a field, as a reader would say it."""
    if schema.get("x-kubernetes-int-or-string"):
        return "integer or string"
    if schema.get("type") == "array":
        return f"list of {kind_of(schema['items'])}"
    if schema.get("type") == "object" and "additionalProperties" in schema:
        return "map of strings"
    return schema.get("type", "any")


def bounds(schema):
    """What the API server demands beside the type."""
    if "enum" in schema:
        yield "One of " + ", ".join(f"`{value}`" for value in schema["enum"])
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        yield f"{low} to {high}"
    elif low is not None:
        yield f"At least {low}" if low else ""
    elif high is not None:
        yield f"At most {high}"
    for key, what in (("maxLength", "characters"), ("maxItems", "entries"), ("maxProperties", "entries")):
        if key in schema and not schema.get("x-kubernetes-int-or-string"):
            yield f"At most {schema[key]} {what}"


def rows(schema, path=""):
    """Each field below a schema: its path, and its schema, parents first."""
    required = schema.get("required", [])
    for name, child in schema.get("properties", {}).items():
        here = f"{path}.{name}" if path else name
        yield here, child, name in required
        if child.get("type") == "array":
            yield from rows(child["items"], f"{here}[]")
        elif isinstance(child.get("additionalProperties"), dict):
            yield from rows(child["additionalProperties"], f"{here}.*")
        else:
            yield from rows(child, here)


def table(schema, path):
    yield "| field | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for name, child, required in rows(schema, path):
        default = "required" if required else code(child["default"]) if "default" in child else ""
        meaning = [child.get("description", ""), *bounds(child)]
        meaning = ". ".join(part.rstrip(".") for part in meaning if part)
        yield f"| `{name}` | {cell(kind_of(child))} | {default} | {cell(meaning)} |"


def columns(version):
    for column in version.get("additionalPrinterColumns", []):
        wide = " with `-o wide`" if column.get("priority") else ""
        yield f"`{column['name']}`{wide}"


def section(definition):
    spec = definition["spec"]
    names = spec["names"]
    (version,) = spec["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    yield f"\n## {names['kind']}\n"
    if text := schema.get("description"):
        yield f"{cell(text)}\n"
    yield f"- API version: `{spec['group']}/{version['name']}`"
    called = dict.fromkeys([names["plural"], names["singular"], *names.get("shortNames", [])])
    yield f"- Names for kubectl: {', '.join(f'`{name}`' for name in called)}"
    scope = "namespaced" if spec["scope"].startswith("Namespace") else "one for the whole cluster"
    yield f"- Scope: {scope}"
    yield f"- Columns of `kubectl get`: {', '.join(columns(version))}"
    for part in ("spec", "status"):
        if below := schema["properties"].get(part):
            yield f"\n### {part} of {names['kind']}\n"
            yield from table(below, part)


def text():
    lines = [HEADER.rstrip()]
    for path in DEFINITIONS:
        for definition in chart.documents(path.read_text()):
            lines += section(definition)
    return "\n".join(lines) + "\n"


def resources():
    """docs/resources.md is what the definitions say."""
    if not PAGE.exists() or PAGE.read_text() != text():
        yield "docs/resources.md is not what the definitions say: run make render"


CHECKS = (resources,)

if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(__doc__)
    PAGE.write_text(text())
