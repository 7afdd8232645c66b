"""The chart's README, which has every value with its default and the description of the schema, and all documents' code.

    readme.py --write     writes it anew
"""

import json
import sys

import yaml

import chart

PATH = chart.CHART / "README.md"
HEAD = """# csi-driver-oci

<!-- Generated from values.yaml and values.schema.json by `make render`. -->

{description}.

```sh
helm install csi-driver-oci oci://ghcr.io/csi-driver-oci/charts/csi-driver-oci --namespace csi-driver-oci
```

The namespace must allow privileged pods. A chart from a clone needs `--set image.repository=...`, because no image of its
version is published. The [installation
page](https://github.com/csi-driver-oci/csi-driver-oci/blob/main/docs/installation.md) has all steps, upgrades and the
uninstall. `values.yaml` has examples.

It needs Kubernetes {kubernetes}, and before 1.29 the sidecar `sidecars.registrar`.
"""


def schema():
    return json.loads((chart.CHART / "values.schema.json").read_text())


def resolved(node, definitions):
    """A property with what it refers to. Its own description counts."""
    reference = node.get("$ref", "").rpartition("/")[2]
    return definitions[reference] | node if reference else node


def properties(node, definitions, path=""):
    """Path -> property, depth first, those of items of lists included."""
    node = resolved(node, definitions)
    for name, child in node.get("properties", {}).items():
        below = f"{path}.{name}" if path else name
        child = resolved(child, definitions)
        yield below, child
        yield from properties(child, definitions, below)
    if isinstance(node.get("items"), dict):
        yield from properties(node["items"], definitions, f"{path}[]")


def default_of(values, path):
    """The default of a value, as JSON in one line; None where the chart has none."""
    for name in path.split("."):
        if not isinstance(values, dict) or name not in values:
            return None
        values = values[name]
    text = json.dumps(values)
    return f"`{text}`" if len(text) <= 60 else "see `values.yaml`"


def text_of(node):
    words = [node.get("description", "")]
    if "enum" in node:
        words.append("One of " + ", ".join(f"`{each}`" for each in node["enum"]) + ".")
    return " ".join(words).replace("|", "\\|").replace("<", "&lt;")


def rendered():
    about = yaml.safe_load((chart.CHART / "Chart.yaml").read_text())
    values = yaml.safe_load((chart.CHART / "values.yaml").read_text())
    whole = schema()
    kubernetes = about["kubeVersion"].removeprefix(">=").removesuffix(".0-0") + " or newer"
    lines = [HEAD.format(description=about["description"], kubernetes=kubernetes)]
    single = ["## Values", "", "| value | default | description |", "| --- | --- | --- |"]
    sections = []
    for name, node in whole["properties"].items():
        node = resolved(node, whole["definitions"])
        rows = list(properties(node, whole["definitions"], name))
        if not node.get("properties"):
            for path, each in [(name, node), *rows]:
                single.append(f"| `{path}` | {default_of(values, path) or ''} | {text_of(each)} |")
            continue
        sections += [f"### {name}", "", text_of(node), "", "| value | default | description |", "| --- | --- | --- |"]
        for path, each in rows:
            # A section by itself has no default.
            default = "" if each.get("properties") else default_of(values, path) or ""
            sections.append(f"| `{path}` | {default} | {text_of(each)} |")
        sections.append("")
    return "\n".join([*lines, *single, "", *sections]).rstrip() + "\n"


def readme():
    """Every value has a description, and the README has them all."""
    whole = schema()
    seen = 0
    for path, node in properties(whole, whole["definitions"]):
        seen += 1
        if len(node.get("description", "").split()) < 2:
            yield f"values.schema.json: {path} has no description"
    known = {path for path, _ in properties(whole, whole["definitions"])}
    values = yaml.safe_load((chart.CHART / "values.yaml").read_text())
    for path in paths(values):
        if path not in known:
            yield f"values.yaml: {path} is not in values.schema.json"
    if seen < 150:
        yield f"only {seen} values were looked at"
    if not PATH.exists() or PATH.read_text() != rendered():
        yield "charts/csi-driver-oci/README.md is not what values.yaml and values.schema.json say: run make render"


# Values whose keys are the user's.
FREE = ("affinity", "labels", "resources", "config", "nodeSelector", "annotations", "namespaceSelector")


def paths(values, path=""):
    for name, value in values.items():
        below = f"{path}.{name}" if path else name
        yield below
        if isinstance(value, dict) and name not in FREE:
            yield from paths(value, below)


def code_blocks():
    """Every block of code in a document has a language, so that it is highlighted."""
    pages = list(chart.ROOT.glob("*.md"))
    for folder in ("docs", "charts", "crates", ".github"):
        pages += (chart.ROOT / folder).rglob("*.md")
    blocks = 0
    for path in sorted(pages):
        lines = enumerate(path.read_text().splitlines(), 1)
        fences = [(number, line.strip()) for number, line in lines if line.strip().startswith("```")]
        for number, fence in fences[::2]:
            blocks += 1
            if fence == "```":
                yield f"{path.relative_to(chart.ROOT)}, line {number}: the block of code has no language"
    if blocks < 50:
        yield f"only {blocks} blocks of code were looked at"


CHECKS = (readme, code_blocks)

if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(__doc__)
    PATH.write_text(rendered())
