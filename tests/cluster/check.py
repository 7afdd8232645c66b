"""Checks of what users apply that need no driver.

    check.py NAME      runs one check; prints what is wrong, and exits 1 if anything is
    check.py all       all of them
"""

import functools
import json
import multiprocessing
import re
import sys
import tomllib

import kubernetes_validate
import yaml

import admission
import chart
import crossplane
import fleet
import gitops
import monitoring
import node_status
import plain
import pull_secrets
import provisioner
import readme
import render
import resources
import startup_taint
import story

# It reads all definitions of a version anew for each object.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)

# The oldest that the chart is for, and the newest that there are schemas of.
VERSIONS = ["1.25", "1.29", "1.30", "1.33", "1.36", "1.37"]
# What names the image of Rust that releases and checks are built in.
BUILT_IN = [chart.ROOT / "Dockerfile", *sorted((chart.ROOT / ".github/workflows").glob("*.yml"))]
# Groups that Kubernetes itself does not have.
FOREIGN = (
    "apiextensions.crossplane.io/",
    "argoproj.io/",
    "custom.prometheus.io/",
    "kustomize.toolkit.fluxcd.io/",
    "monitoring.coreos.com/",
    "oci.custom.io/",
    "pkg.crossplane.io/",
    "serving.kserve.io/",
    "source.toolkit.fluxcd.io/",
)


def is_foreign(document):
    return document["apiVersion"].startswith(FOREIGN)


def name_of(document):
    return f"{document['kind']} {document['metadata'].get('name')}"


# Objects that are valid, with the version: most rows have most of them in common.
VALID = set()


def invalid(where, documents, version):
    for document in documents:
        text = json.dumps(document, sort_keys=True), version
        if is_foreign(document) or text in VALID:
            continue
        try:
            kubernetes_validate.validate(document, version, strict=True)
            VALID.add(text)
        except kubernetes_validate.ValidationError as error:
            path = "/".join(str(part) for part in error.path)
            yield f"{where}: {name_of(document)} on {version}: {path}: {error.message}"
        except kubernetes_validate.SchemaNotFoundError:
            yield f"{where}: {name_of(document)}: {version} has no {document['apiVersion']}"


def lint():
    """`helm lint` has nothing to say about any row."""
    for row, values in chart.matrix().items():
        for message in chart.lint_messages(values):
            yield f"{row}: {message}"


def notes():
    """NOTES say what to try after an install, and what an upgrade means after one."""
    for upgrade in (False, True):
        text = chart.texts({}, upgrade=upgrade)["NOTES.txt"]
        if ("is as safe" in text) != upgrade or "kubectl apply -f -" not in text:
            yield f"the notes of an {'upgrade' if upgrade else 'install'} are:\n{text}"
        # What keeps a release whose uninstall was refused, ready to be pasted.
        if not re.search(rf"(?m)^  helm -n {chart.RELEASE} rollback {chart.RELEASE} \d+$", text):
            yield f"the notes do not say how to keep a release that cannot be uninstalled:\n{text}"
        pod = text.partition("<<'END'\n")[2].partition("  END\n")[0]
        yield from invalid("NOTES", chart.documents(pod), VERSIONS[-1])


def refused():
    """Wrong values are refused, and the message says which."""
    for case in yaml.safe_load((chart.ROOT / "tests/cluster/refused.yaml").read_text()):
        try:
            chart.objects(case["values"], case.get("kubernetes", chart.KUBERNETES))
        except chart.Refused as refusal:
            if case["message"] not in str(refusal):
                yield f"{case['name']}: refused, but not with {case['message']!r}: {refusal}"
        else:
            yield f"{case['name']}: accepted"


def published():
    """Without a released image, the chart says what to do; with a registry of its own it needs none."""
    try:
        chart.texts({}, image=None)
    except chart.Refused as refusal:
        for part in ("no published image", "docker push", "--set image.repository="):
            if part not in str(refusal):
                yield f"the refusal of the default image does not have {part!r}: {refusal}"
    else:
        yield "the chart renders with an image that is not published"
    values = yaml.safe_load((chart.CHART / "ci/everything-values.yaml").read_text())
    values |= {"global": {"imageRegistry": "mirror.example.com:5000"}, "warm": {"artifacts": [{"name": "a", "reference": "r"}]}}
    for row in (values, {"global": {"imageRegistry": "mirror.example.com:5000"}}):
        for name, text in chart.texts(row, image=None).items():
            for image in re.findall(r"(?m)^\s+image: (\S+)$", text):
                if not image.startswith("mirror.example.com:5000/") and name != "NOTES.txt":
                    yield f"{name}: {image} is not in global.imageRegistry"


def commented():
    """Every value is explained: above it or behind it, or above what it belongs to."""
    lines = (chart.CHART / "values.yaml").read_text().splitlines()
    explained = []
    for number, line in enumerate(lines):
        key, colon, _ = line.strip().partition(":")
        if not colon or key.startswith(("#", "-")):
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        around = lines[max(number - 1, 0)].strip(), lines[number + 1 : number + 2]
        # The comment on a section stands above its first key too.
        own = around[0].startswith("#") or "".join(around[1]).strip().startswith("#")
        explained = [*explained[:depth], own]
        if not any(explained):
            yield f"values.yaml, line {number + 1}: {key} is not explained"


def documented():
    """The schema of `config` has the keys that docs/configuration.md has, section by section."""
    text = (chart.ROOT / "docs/configuration.md").read_text()
    blocks = [each.partition("```")[0] for each in text.split("```yaml\n")[1:]]
    (sample,) = [yaml.safe_load(each) for each in blocks if "kind: NodeConfiguration" in each]
    schema = json.loads((chart.CHART / "values.schema.json").read_text())
    sections = schema["definitions"]["configuration"]["properties"]
    for section, keys in sample.items():
        if section in ("apiVersion", "kind"):
            continue
        if section not in sections:
            yield f"values.schema.json lacks config.{section}, which docs/configuration.md has"
            continue
        known = set(sections[section]["properties"])
        for key in sorted(known ^ set(keys)):
            where = "values.schema.json" if key in known else "docs/configuration.md"
            yield f"config.{section}.{key} is in {where} only"
    # What the sample leaves empty is as good as absent.
    given = {
        section: {key: value for key, value in keys.items() if value not in (None, "", [])}
        for section, keys in sample.items()
        if isinstance(keys, dict)
    }
    chart.objects({"config": given})


def versions():
    """The image that the manifests name is the version that Cargo builds, and all is built with one version of Rust."""
    package = tomllib.loads((chart.ROOT / "Cargo.toml").read_text())["workspace"]["package"]
    built = package["version"]
    about = yaml.safe_load((chart.CHART / "Chart.yaml").read_text())
    named = {
        "Chart.yaml": about["appVersion"],
        "Chart.yaml, artifacthub.io/images": re.search(r"image: \S+:(\S+)", about["annotations"]["artifacthub.io/images"])[1],
        "Dockerfile": re.search(
            r'image\.version="([^"]+)"', (chart.ROOT / "Dockerfile").read_text()
        )[1],
    }
    for path in sorted((chart.ROOT / "deploy").rglob("kustomization.yaml")):
        for image in yaml.safe_load(path.read_text()).get("images", []):
            named[str(path.relative_to(chart.ROOT))] = image["newTag"]
    for where, version in named.items():
        if version != built:
            yield f"{where} is for {version}, and Cargo builds {built}"
    rust = package["rust-version"]
    pinned = tomllib.loads((chart.ROOT / "rust-toolchain.toml").read_text())["toolchain"]["channel"]
    images = [path.name for path in BUILT_IN if f"rust:{rust}-bookworm" not in path.read_text()]
    if not pinned.startswith(f"{rust}.") or images:
        yield f"Cargo.toml is for Rust {rust}, rust-toolchain.toml for {pinned}, and these for another: {images}"


def schemas():
    """Everything is valid, strictly, for every Kubernetes that it is for."""
    for row, values in chart.matrix().items():
        for version in VERSIONS:
            try:
                documents = chart.objects(values, f"{version}.0")
            except chart.Refused as refusal:
                if "needs" not in str(refusal):
                    yield f"{row} on {version}: {refusal}"
                continue
            yield from invalid(row, documents, version)
    groups = render.plain() | render.kustomizations() | render.composed()
    groups |= dict(pods_of_runtimes(groups))
    for where, documents in groups.items():
        # Admission policies are older than their version v1.
        oldest = 30 if where.startswith("deploy/crossplane") else 29
        for version in VERSIONS:
            if int(version[2:]) >= oldest:
                yield from invalid(where, documents, version)


def pods_of_runtimes(groups):
    """The pods of KServe's ServingRuntimes, whose own definition is not here."""
    for where, documents in groups.items():
        for document in documents:
            if document["kind"] == "ServingRuntime":
                spec = {key: document["spec"][key] for key in ("containers", "volumes")}
                metadata = {"name": document["metadata"]["name"]}
                pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
                yield f"{where}, the pod of {name_of(document)}", [pod]


def deploy():
    """deploy/base is what the chart renders to, and each overlay what it renders to with its kubelet's folder."""
    for name in plain.differences():
        yield f"deploy/base/{name} is not what the chart renders to: run deploy/render"
    values = yaml.safe_load((chart.ROOT / "deploy/values.yaml").read_text())
    overlays = {
        "deploy": "/var/lib/kubelet",
        "deploy/overlays/k0s": "/var/lib/k0s/kubelet",
        "deploy/overlays/microk8s": "/var/snap/microk8s/common/var/lib/kubelet",
    }
    built = render.kustomizations()
    for folder, kubelet in overlays.items():
        expected = without_helm(chart.objects(values | {"kubeletDir": kubelet}))
        if by_name(built[folder]) != by_name(expected):
            yield f"{folder} is not what the chart renders to with kubeletDir {kubelet}"


def without_helm(documents):
    for document in documents:
        labels = document["metadata"]["labels"]
        for label in ("helm.sh/chart", "app.kubernetes.io/managed-by"):
            labels.pop(label, None)
    return documents


def by_name(documents):
    return {name_of(document): document for document in documents}


CHECKS = {
    check.__name__: check
    for check in (
        # The longest first: they take as long as all others.
        story.crossplane_ready,
        story.crossplane_story,
        schemas,
        lint,
        notes,
        refused,
        published,
        commented,
        documented,
        versions,
        deploy,
        admission.admission,
        *crossplane.CHECKS,
        *fleet.CHECKS,
        *gitops.CHECKS,
        *monitoring.CHECKS,
        *node_status.CHECKS,
        *pull_secrets.CHECKS,
        *provisioner.CHECKS,
        *readme.CHECKS,
        *resources.CHECKS,
        *startup_taint.CHECKS,
    )
}


def run(name):
    return list(CHECKS[name]())


if __name__ == "__main__":
    names = list(CHECKS) if sys.argv[1:] == ["all"] else sys.argv[1:]
    if len(names) > 1:
        # New processes: Helm's engine has threads, which a fork loses.
        with multiprocessing.get_context("spawn").Pool() as pool:
            found = list(pool.imap(run, names))
    else:
        found = [run(name) for name in names]
    problems = [problem for each in found for problem in each]
    print("\n".join(problems))
    raise SystemExit(1 if problems or not names else 0)
