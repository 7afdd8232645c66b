"""The driver: its image, and its chart installed by Helm."""

import os
import re
import shlex
import shutil

from isolation import run, wait_until
from layout import AUTHORITY, EARLIER, PROGRAMS, REPOSITORY, RUN
from registries import push_image

IMAGE = "registry.example.com/csi-driver-oci:test"
NAME = "csi-driver-oci"


def push(program, tree=REPOSITORY, reference=IMAGE):
    """Pushes an image of what the Dockerfile's last step in `builder` puts into /image, with its metadata."""
    dockerfile = (tree / "Dockerfile").read_text().replace("\\\n", "")
    script = re.search(r"^RUN (mkdir -p /image.*)$", dockerfile, re.MULTILINE).group(1)
    image = RUN / "image"
    script = re.sub(r"target/release/csi-driver-oci", shlex.quote(str(program)), script)
    script = re.sub(r"(?<![\w./-])/image\b", shlex.quote(str(image)), script)
    run("sh", "-euc", script)
    entrypoint = re.search(r'^ENTRYPOINT \["(.*)"\]$', dockerfile, re.MULTILINE).group(1)
    command = re.search(r'^CMD \["(.*)"\]$', dockerfile, re.MULTILINE).group(1)
    user = re.search(r"^USER (\S+)$", dockerfile, re.MULTILINE).group(1)
    push_image(reference, image, [entrypoint], [command], user)
    shutil.rmtree(image)


def push_earlier():
    """Pushes the image and packages the chart of an earlier commit, if scripts/cluster has made them."""
    if "EARLIER_COMMIT" not in os.environ:
        return
    push(EARLIER / "csi-driver-oci", EARLIER / "tree", f"{IMAGE.rpartition(':')[0]}:earlier")
    chart = EARLIER / "tree/charts" / NAME
    package = run(PROGRAMS / "helm", "package", chart, "--destination", RUN / "earlier")
    os.environ["EARLIER_CHART"] = package.strip().rpartition(": ")[2]


def values():
    """The chart's values: what a cluster needs whose registries have a certificate authority of their own."""
    authority = "".join(f"    {line}\n" for line in AUTHORITY.read_text().splitlines())
    return f"""
image:
  repository: {IMAGE.rpartition(":")[0]}
  tag: {IMAGE.rpartition(":")[2]}
tls:
  extraCertificates: |
{authority}
# The machine's disk is others' too.
config: {{cache: {{highThresholdPercent: 100, minFreePercent: 0, minFreeInodesPercent: 0}}}}
# The setting has no namespace: it is the machine's.
node: {{leases: Keep}}
controller: {{enabled: true, maxPreloadsPerNamespace: 8, nodeLabels: true, nodeConditionNamespaces: [platform]}}
provisioner: {{enabled: true, maxClaimsPerNamespace: 8}}
events: {{enabled: true}}
startupTaint: {{enabled: true}}
"""


def has_authority():
    """Whether the controller manager has put what pods need into the namespace."""
    found = run("kubectl", "--namespace", NAME, "get", "configmaps", "--output=name")
    return "configmap/kube-root-ca.crt" in found


def install():
    """Packages the chart and installs it. Returns when all of it is ready."""
    package = run(PROGRAMS / "helm", "package", REPOSITORY / "charts" / NAME, "--destination", RUN)
    package = package.strip().rpartition(": ")[2]
    (RUN / "values.yaml").write_text(values())
    run("kubectl", "create", "namespace", NAME)
    run("kubectl", "label", "namespace", NAME, "pod-security.kubernetes.io/enforce=privileged")
    # Pods with a token that come earlier get a warning.
    wait_until("the namespace's certificate authority", has_authority, 30)
    return run(
        PROGRAMS / "helm", "install", NAME, package, "--namespace", NAME, "--values", RUN / "values.yaml",
        "--wait", "--timeout=3m",
    )  # fmt: skip
