"""Renders everything that users apply, as JSON for the tests that go on with it.

    render.py FOLDER

    FOLDER/chart/ROW.json        the objects of each row of the matrix of values
    FOLDER/plain/FILE.json       the objects of each manifest under deploy/ and examples/
    FOLDER/kustomize/NAME.json   what `kubectl kustomize` makes of each kustomization under deploy/
    FOLDER/composed/NAME.json    what each Composition makes of the example, once all is ready
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import yaml

import chart
import compose

FOLDERS = ["deploy", "examples"]
# Not manifests: what configures their rendering, and rules for a Prometheus without its operator.
NOT_APPLIED = {"deploy/values.yaml"} | {
    f"deploy/monitoring/{name}.yaml" for name in ("alerts", "alerts.test", "controller-alerts.test")
}


def plain():
    """Path from the root -> objects, for every manifest that is not a kustomization."""
    files = {}
    for folder in FOLDERS:
        for path in sorted((chart.ROOT / folder).rglob("*.yaml")):
            name = str(path.relative_to(chart.ROOT))
            if path.name != "kustomization.yaml" and name not in NOT_APPLIED:
                files[name] = chart.documents(path.read_text())
    return files


def kustomization(folder, changes=None):
    """What `kubectl kustomize` makes of a folder, with some of its files changed."""
    with tempfile.TemporaryDirectory() as room:
        if changes:
            copied = pathlib.Path(room) / folder.name
            shutil.copytree(folder, copied)
            for name, change in changes.items():
                path = copied / name
                path.write_text(change(path.read_text()))
            folder = copied
        text = subprocess.run(
            ["kubectl", "kustomize", folder], check=True, capture_output=True, text=True
        ).stdout
    return chart.documents(text)


def kustomizations():
    """Path of the folder from the root -> objects."""
    return {
        str(path.parent.relative_to(chart.ROOT)): kustomization(path.parent)
        for path in sorted((chart.ROOT / "deploy").rglob("kustomization.yaml"))
    }


def example():
    """The example of the new API."""
    return yaml.safe_load((chart.ROOT / "deploy/crossplane/example/prometheus.yaml").read_text())


def composed():
    """Name of a Composition -> what it makes of the example, once the gate is open."""
    xr = example()
    at_once, _ = compose.compose("customprometheus", xr)
    gated, _ = compose.compose("customprometheus-gated", xr)
    ready = {"artifact": compose.preloaded(gated["artifact"], "sha256:" + "ab" * 32)}
    gated, _ = compose.compose("customprometheus-gated", xr, ready)
    named = {"customprometheus": at_once, "customprometheus-gated": gated}
    return {name: list(objects.values()) for name, objects in named.items()}


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
    write(target / "composed", composed())
