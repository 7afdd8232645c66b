"""What collects, shows and judges metrics: the monitors, the dashboard and the alerts of the chart."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import yaml

import chart

FILES = chart.CHART / "files"
# What scripts/install-test-tools has got, beside this Python.
TOOLS = pathlib.Path(sys.executable).parents[2] / "bin"
RUNBOOKS = "https://github.com/csi-driver-oci/csi-driver-oci/blob/main/"


def groups():
    """Groups of alerts, those of the controller included."""
    of_nodes = yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"]
    return of_nodes + yaml.safe_load((FILES / "controller-alerts.yaml").read_text())


def anchors(text):
    """The anchors of a page's headings, as GitHub and mdbook make them."""
    for heading in re.findall(r"(?m)^#+ (.+)$", text):
        yield re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def runbooks():
    """Every alert names a place of the documentation that exists, and the page on alerts has no others."""
    named = {}
    for rule in (rule for group in groups() for rule in group["rules"]):
        url = rule["annotations"].get("runbook_url", "")
        page, _, anchor = url.removeprefix(RUNBOOKS).partition("#")
        path = chart.ROOT / page
        if not url.startswith(RUNBOOKS) or not path.is_file():
            yield f"{rule['alert']}: no such page: {url!r}"
        elif anchor not in anchors(path.read_text()):
            yield f"{rule['alert']}: {page} has no heading for #{anchor}"
        named.setdefault(path, set()).add(rule["alert"])
    for path, alerts in named.items():
        for heading in re.findall(r"(?m)^#+ (CsiOci\w+)$", path.read_text()):
            if heading not in alerts:
                yield f"{path.name}: there is no alert {heading}"


def metrics():
    """Alerts and dashboard ask for metrics that the documentation has."""
    pages = [chart.ROOT / "docs" / name for name in ("metrics.md", "preloading.md", "how-to/claims.md")]
    documented = set(re.findall(r"`(csi_oci_\w+)", "\n".join(page.read_text() for page in pages)))
    seen = 0
    for path in (FILES / "alerts.yaml", FILES / "controller-alerts.yaml", FILES / "dashboard.json"):
        for name in sorted(set(re.findall(r"csi_oci_\w+", path.read_text()))):
            seen += 1
            if re.sub(r"_(bucket|count|sum)$", "", name) not in documented:
                yield f"{path.name}: {name} is in no page"
    if seen < 20:
        yield f"only {seen} metrics were looked at"


def dashboard():
    """Every panel says what it shows, panels do not overlap, and those of nodes follow the variable."""
    panels = json.loads((FILES / "dashboard.json").read_text())["panels"]
    taken = set()
    for panel in panels:
        title, at = panel["title"], panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        if taken & cells or at["x"] + at["w"] > 24:
            yield f"{title}: it lies on another panel"
        taken |= cells
        if panel["type"] == "row":
            continue
        if len(panel.get("description", "").split()) < 4:
            yield f"{title}: no description"
        for target in panel["targets"]:
            of_controller = re.search(r"csi_oci_(controller|preload|claim)", target["expr"])
            if not of_controller and target["expr"].count("csi_oci_") != target["expr"].count('{node=~"$node"'):
                yield f"{title}: {target['expr']} does not follow the variable node"
    if len({panel["id"] for panel in panels}) != len(panels):
        yield "two panels have one id"


def monitors():
    """Each monitor finds its pods, by the port that they declare, and those of nodes carry the node."""
    seen = 0
    for row, kind in (("everything", "PodMonitor"), ("fleet", "ServiceMonitor")):
        objects = chart.objects(chart.matrix()[row])
        templates = [each["spec"]["template"] for each in objects if each["kind"] in ("DaemonSet", "Deployment")]
        services = [each for each in objects if each["kind"] == "Service"]
        for monitor in (each for each in objects if each["kind"] == kind):
            seen += 1
            where = f"{row}: {kind} {monitor['metadata']['name']}"
            selector = monitor["spec"]["selector"]["matchLabels"]
            if kind == "ServiceMonitor":
                found = [each for each in services if selector.items() <= each["metadata"]["labels"].items()]
                if len(found) != 1:
                    yield f"{where}: finds {len(found)} services"
                    continue
                selector = found[0]["spec"]["selector"]
            found = [each for each in templates if selector.items() <= each["metadata"]["labels"].items()]
            ports = [port["name"] for each in found for one in each["spec"]["containers"] for port in one.get("ports", [])]
            if len(found) != 1 or "metrics" not in ports:
                yield f"{where}: finds {len(found)} kinds of pods, with the ports {ports}"
            (endpoint,) = monitor["spec"]["endpoints" if kind == "ServiceMonitor" else "podMetricsEndpoints"]
            node = [each["targetLabel"] for each in endpoint.get("relabelings", [])] == ["node"]
            if node == monitor["metadata"]["name"].endswith("-fleet"):
                yield f"{where}: the label node is {'set' if node else 'missing'}"
    if seen < 3:
        yield f"only {seen} monitors were looked at"


def alerts():
    """The alerts of the controller fire when they should, and that on a DaemonSet is about the release's."""
    with tempfile.TemporaryDirectory() as room:
        room = pathlib.Path(room)
        (room / "rules.yaml").write_text("groups:\n" + (FILES / "controller-alerts.yaml").read_text())
        tests = yaml.safe_load((chart.ROOT / "deploy/monitoring/controller-alerts.test.yaml").read_text())
        (room / "tests.yaml").write_text(yaml.safe_dump(tests | {"rule_files": ["rules.yaml"]}))
        promtool = shutil.which("promtool", path=f"{TOOLS}{os.pathsep}{os.environ['PATH']}")
        run = subprocess.run([promtool, "test", "rules", room / "tests.yaml"], capture_output=True, text=True)
        if run.returncode:
            yield run.stdout + run.stderr
    tested = json.dumps(tests)
    for rule in yaml.safe_load((FILES / "controller-alerts.yaml").read_text())[0]["rules"]:
        if rule["alert"] not in tested:
            yield f"{rule['alert']} has no test"
    values = chart.matrix()["everything"] | {"fullnameOverride": "other"}
    (rules,) = [each for each in chart.objects(values) if each["kind"] == "PrometheusRule"]
    if 'daemonset="other"' not in json.dumps(rules).replace('\\"', '"'):
        yield "the alert on a DaemonSet is not about that of the release"


CHECKS = (runbooks, metrics, dashboard, monitors, alerts)
