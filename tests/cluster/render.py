"""Renders everything that users apply, as JSON for the tests that go on with it.

    render.py FOLDER

    FOLDER/chart/ROW.json        the objects of each row of the matrix of values
    FOLDER/plain/FILE.json       the objects of each manifest under deploy/ and examples/
    FOLDER/kustomize/NAME.json   what `kubectl kustomize` makes of each kustomization under deploy/
"""

import json
import pathlib
import subprocess
import sys

import chart

FOLDERS = ["deploy", "examples"]
# Not manifests: what configures their rendering.
NOT_APPLIED = {"deploy/values.yaml"}


def plain():
    """Path from the root -> objects, for every manifest that is not a kustomization."""
    files = {}
    for folder in FOLDERS:
        for path in sorted((chart.ROOT / folder).rglob("*.yaml")):
            name = str(path.relative_to(chart.ROOT))
            if path.name != "kustomization.yaml" and name not in NOT_APPLIED:
                files[name] = chart.documents(path.read_text())
    return files


def kustomizations():
    """Path of the folder from the root -> objects."""
    built = {}
    for path in sorted((chart.ROOT / "deploy").rglob("kustomization.yaml")):
        folder = path.parent
        text = subprocess.run(
            ["kubectl", "kustomize", folder], check=True, capture_output=True, text=True
        ).stdout
        built[str(folder.relative_to(chart.ROOT))] = chart.documents(text)
    return built


def write(folder, groups):
    folder.mkdir(parents=True)
    for name, objects in groups.items():
        path = folder / (name.replace("/", "__").removesuffix(".yaml") + ".json")
        path.write_text(json.dumps(objects))


if __name__ == "__main__":
    target = pathlib.Path(sys.argv[1])
    rows = {name: chart.objects(values) for name, values in chart.matrix().items()}
    write(target / "chart", rows)
    write(target / "plain", plain())
    write(target / "kustomize", kustomizations())
