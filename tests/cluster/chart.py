"""The chart, rendered by Helm's own engine."""

import json
import pathlib

import yaml
from helm_python import HelmError, _native
from helm_python.chart import Chart, lint

# The parser in C, ten times as fast as the one that safe_load takes by itself.
yaml.SafeLoader = yaml.CSafeLoader

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/csi-driver-oci"
RELEASE = "csi-driver-oci"
# In the place of an image that is pushed: the default is that of a release.
IMAGE = "csi-driver-oci"
# The newest that Helm's engine stands for unless it is told another one.
KUBERNETES = "1.36.0"


class Refused(Exception):
    """What the schema or a check of the templates says about values."""


def matrix():
    """Name of a row -> values: the chart's defaults and every file under its ci/."""
    rows = {"defaults": {}}
    for path in sorted((CHART / "ci").glob("*-values.yaml")):
        rows[path.name.removesuffix("-values.yaml")] = yaml.safe_load(path.read_text())
    return rows


def with_image(values, image):
    """The values with a repository of the image, unless they name one."""
    return values | {"image": {"repository": image} | values.get("image", {})} if image else values


def texts(values, kubernetes=KUBERNETES, path=CHART, upgrade=False, image=IMAGE):
    """Path of a template -> what it renders to."""
    options = {
        "name": RELEASE,
        "namespace": RELEASE,
        "kube_version": kubernetes,
        "is_upgrade": upgrade,
        "is_install": not upgrade,
    }
    with Chart.load(path) as chart:
        try:
            # The library's own `render` leaves out the version of Kubernetes.
            rendered = _native.call_string(
                "helm_render", chart._raw(), json.dumps(with_image(values, image)), json.dumps(options)
            )
        except HelmError as error:
            raise Refused(str(error)) from error
    return {
        name.partition("/templates/")[2]: text for name, text in json.loads(rendered).items()
    }


def documents(text):
    """The objects of a YAML text; empty documents are none."""
    return [document for document in yaml.safe_load_all(text) if document]


def objects(values, kubernetes=KUBERNETES):
    """Everything that Helm would apply."""
    rendered = texts(values, kubernetes)
    return [
        document
        for name, text in sorted(rendered.items())
        if name != "NOTES.txt"
        for document in documents(text)
    ]


def lint_messages(values):
    """What `helm lint --strict` finds."""
    values = with_image(values, IMAGE)
    report = lint(str(CHART), values, namespace=RELEASE, kube_version=KUBERNETES)
    return [str(message) for message in report["messages"]]
