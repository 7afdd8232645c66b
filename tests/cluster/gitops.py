"""Checks of what stands in several manifests and must agree."""

import re

import yaml

import chart
import compose
import render

FOLDER = chart.ROOT / "deploy/gitops"
VERSION = "v9-of-a-test"
DIGEST = "sha256:" + "9a" * 32
SECRET = "registry-credentials"


def volumes():
    """Every volume of the driver in every manifest is asked for read-only: nodes with SELinux need it."""
    rows = {row: chart.objects(values) for row, values in chart.matrix().items()}
    groups = rows | render.plain() | render.kustomizations() | render.composed()
    seen = 0
    for where, documents in groups.items():
        for document in documents:
            for source in sources(document):
                seen += 1
                if source.get("readOnly") is not True:
                    yield f"{where}: {document['kind']} has a volume without readOnly: true"
    if seen < 10:
        yield f"only {seen} volumes were looked at"


def sources(value):
    """Every CSI volume source of the driver, inline or of a PersistentVolume."""
    if isinstance(value, dict):
        if value.get("driver") == "oci.custom.io":
            yield value
        for child in value.values():
            yield from sources(child)
    elif isinstance(value, list):
        for child in value:
            yield from sources(child)


def agree(where, documents, secret=None):
    """The job, the preload and the object name one artifact and one secret, if any."""
    built = {document["kind"]: document for document in documents}
    job = built["Job"]["spec"]["template"]["spec"]
    preload = built["ArtifactPreload"]["spec"]
    spec = built["CustomPrometheus"]["spec"]
    wanted = f"{spec['ociRegistry']}:{VERSION}@{DIGEST}"
    found = {
        "job": (
            job["containers"][0]["args"][1],
            [each["secret"]["secretName"] for each in job["volumes"] if "secret" in each],
        ),
        "preload": (preload["reference"], preload.get("pullSecrets", [])),
        "object": (
            f"{spec['ociRegistry']}:{spec['version']}@{spec['digest']}",
            [spec["imagePullSecret"]] if "imagePullSecret" in spec else [],
        ),
    }
    for name, parts in found.items():
        if parts != (wanted, [secret] if secret else []):
            yield f"{where}: the {name} is for {parts}, and should be for {wanted} with the secret {secret}"
    if ("--docker-config=/docker/config.json" in job["containers"][0]["args"]) != bool(secret):
        yield f"{where}: the job has the arguments {job['containers'][0]['args']}, and the secret is {secret}"


def with_secret(text):
    """A kustomization with the lines for a private registry, as its comment says."""
    public, comment, private = text.partition("# patches:\n")
    return public + (comment + private).replace("# ", "", 1).replace("\n# ", "\n")


def argo_cd():
    """One version and digest in prometheus.yaml reach the check and the warming, and the waves come in order."""
    folder = FOLDER / "argo-cd/prometheus"
    built = render.kustomization(folder, {"prometheus.yaml": set_version})
    yield from agree("argo-cd", built)
    private = render.kustomization(folder, {"prometheus.yaml": set_version, "kustomization.yaml": with_secret})
    yield from agree("argo-cd with a secret", private, secret=SECRET)
    prefix = "argocd.argoproj.io/"
    notes = {each["kind"]: each["metadata"]["annotations"] for each in built}
    if notes["Job"][prefix + "hook"] != "PreSync":
        yield "argo-cd: the check is not before the sync"
    waves = [int(notes[kind][prefix + "sync-wave"]) for kind in ("ArtifactPreload", "CustomPrometheus")]
    if waves != sorted(set(waves)):
        yield f"argo-cd: warming and rolling are the waves {waves}"


def argo_cd_by_digest():
    """The example without a secret: its digest reaches the preload and, once that is ready, the pods."""
    path = chart.ROOT / "examples/argo-cd/prometheus/prometheus.yaml"
    (xr,) = chart.documents(path.read_text())
    spec = xr["spec"]
    name = spec["crossplane"]["compositionRef"]["name"]
    wanted = f"{spec['ociRegistry']}:{spec['version']}@{spec['digest']}"
    preload = compose.compose(name, xr)[0]["artifact"]
    if preload["spec"]["reference"] != wanted or preload["spec"].get("pullSecrets"):
        yield f"examples/argo-cd: the preload is {preload['spec']}, and the object names {wanted}"
    ready = {"artifact": compose.preloaded(preload, spec["digest"])}
    template = compose.compose(name, xr, ready)[0]["statefulset"]["spec"]["template"]
    source = template["spec"]["volumes"][0]["csi"]
    if source["volumeAttributes"]["reference"] != wanted or "nodePublishSecretRef" in source:
        yield f"examples/argo-cd: pods mount {source}, and the object names {wanted}"


def set_version(text):
    # A host with a port, which has the character that the parts of a reference are told apart by.
    text = re.sub(r"(?m)^  ociRegistry: [^/]*", "  ociRegistry: registry.example.com:5000", text)
    text = re.sub(r"(?m)^  version: .*$", f"  version: {VERSION}", text)
    return re.sub(r"(?m)^  digest: .*$", f"  digest: {DIGEST}", text)


def flux():
    """One version and digest in the ConfigMap reach all three, and the second Kustomization waits for the first."""
    documents = chart.documents((FOLDER / "flux/flux.yaml").read_text())
    (values,) = [each["data"] for each in documents if each["kind"] == "ConfigMap"]
    values = values | {"version": VERSION, "digest": DIGEST}

    def substitute(text):
        return re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], text)

    first, second = [each for each in documents if each["kind"] == "Kustomization"]
    if [each["name"] for each in second["spec"]["dependsOn"]] != [first["metadata"]["name"]]:
        yield "flux: rolling does not wait for the check"
    if not (first["spec"]["wait"] and first["spec"]["force"]):
        yield "flux: the check's job is not waited for, or not made anew"
    for secret, changes in ((None, None), (SECRET, {"kustomization.yaml": with_secret})):
        built = []
        for each in (first, second):
            text = yaml.safe_dump_all(render.kustomization(FOLDER / "flux" / each["spec"]["path"], changes))
            built += chart.documents(substitute(text))
        yield from agree(f"flux with the secret {secret}", built, secret=secret)
    for each in (first, second):
        sources = each["spec"]["postBuild"]["substituteFrom"]
        if [source["name"] for source in sources] != ["prometheus-artifact"]:
            yield "flux: the version has two places"


CHECKS = (volumes, argo_cd, argo_cd_by_digest, flux)
