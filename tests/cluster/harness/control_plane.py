"""etcd, the API server, the controller manager and the scheduler, in the cluster's own network namespace."""

import pathlib
import ssl
import urllib.error
import urllib.request

from isolation import run, wait_until
from layout import (
    ADMINISTRATOR, API_SERVICE, CONTROL_PLANE, ETCD, KUBECONFIG, PROGRAMS, REGISTRY, REGISTRY_WITH_USERS, RUN,
    SERVICES, SLOW_REGISTRY,
)  # fmt: skip

FOLDER = RUN / "control-plane"
CERTIFICATE = FOLDER / "certificates/apiserver.crt"
# The authority alone, which is the last one in CERTIFICATE.
AUTHORITY = FOLDER / "authority.crt"


def make_network():
    """One bridge that nodes are plugged into, with all addresses of the control plane and the registries."""
    run("ip", "link", "set", "lo", "up")
    run("ip", "address", "add", f"{API_SERVICE}/32", "dev", "lo")
    # Without an address of its own, a bridge has the lowest of its ports': nodes would lose the API server when another
    # node comes or goes.
    run("ip", "link", "add", "cluster0", "address", "02:00:00:00:00:01", "type", "bridge")
    for address in (CONTROL_PLANE, REGISTRY, REGISTRY_WITH_USERS, SLOW_REGISTRY):
        run("ip", "address", "add", f"{address}/24", "dev", "cluster0")
    run("ip", "link", "set", "cluster0", "up")
    pathlib.Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def kubeconfig(token):
    return f"""
apiVersion: v1
kind: Config
clusters:
  - name: test
    cluster: {{server: "https://{API_SERVICE}", certificate-authority: {AUTHORITY}}}
users:
  - name: test
    user: {{token: {token}}}
contexts:
  - name: test
    context: {{cluster: test, user: test}}
current-context: test
"""


def is_ready():
    request = urllib.request.Request(
        f"https://{API_SERVICE}/readyz", headers={"Authorization": f"Bearer {ADMINISTRATOR}"}
    )
    try:
        trust = ssl.create_default_context(cafile=CERTIFICATE)
        return urllib.request.urlopen(request, timeout=2, context=trust).status == 200
    except (OSError, urllib.error.HTTPError):
        return False


def start_api_server(spawn):
    """Starts etcd and the API server, and waits until it is ready."""
    FOLDER.mkdir()
    run("openssl", "genrsa", "-out", FOLDER / "service-accounts.key", "2048")
    tokens = [
        f'{ADMINISTRATOR},administrator,administrator,"system:masters"',
        "controller-manager-token,system:kube-controller-manager,1",
        "scheduler-token,system:kube-scheduler,2",
    ]
    tokens += [f'node-{number}-token,system:node:node-{number},node-{number},"system:nodes"' for number in range(1, 10)]
    (FOLDER / "tokens.csv").write_text("\n".join(tokens) + "\n")
    KUBECONFIG.write_text(kubeconfig(ADMINISTRATOR))

    spawn("etcd", [
        PROGRAMS / "etcd", f"--data-dir={FOLDER}/etcd", f"--listen-client-urls={ETCD}",
        f"--advertise-client-urls={ETCD}", "--unsafe-no-fsync", "--log-level=warn",
    ])  # fmt: skip
    spawn("kube-apiserver", [
        PROGRAMS / "kube-apiserver", f"--etcd-servers={ETCD}", "--secure-port=443",
        # There is no kube-proxy: the address of the Service is the server's own, and webhooks go to pods.
        f"--bind-address={API_SERVICE}", f"--advertise-address={CONTROL_PLANE}", f"--cert-dir={FOLDER}/certificates",
        "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
        f"--token-auth-file={FOLDER}/tokens.csv", f"--service-cluster-ip-range={SERVICES}",
        f"--service-account-key-file={FOLDER}/service-accounts.key",
        f"--service-account-signing-key-file={FOLDER}/service-accounts.key",
        "--service-account-issuer=https://kubernetes.default.svc",
        "--endpoint-reconciler-type=none", "--enable-aggregator-routing=true",
        "--kubelet-preferred-address-types=InternalIP",
        # What `podPullSecrets` needs before 1.36.
        "--feature-gates=MutatingAdmissionPolicy=true", "--runtime-config=admissionregistration.k8s.io/v1beta1=true",
    ])  # fmt: skip
    # The certificate is made at the first start.
    wait_until("the API server", lambda: CERTIFICATE.exists() and is_ready(), 120)
    AUTHORITY.write_text("-----BEGIN" + CERTIFICATE.read_text().rpartition("-----BEGIN")[2])


def start(spawn):
    """Starts all of it and waits until the API server is ready."""
    start_api_server(spawn)
    for component in ("controller-manager", "scheduler"):
        (FOLDER / component).write_text(kubeconfig(f"{component}-token"))
    spawn("kube-controller-manager", [
        PROGRAMS / "kube-controller-manager", f"--kubeconfig={FOLDER}/controller-manager",
        f"--service-account-private-key-file={FOLDER}/service-accounts.key", f"--root-ca-file={AUTHORITY}",
        "--use-service-account-credentials", "--leader-elect=false", "--bind-address=127.0.0.1",
        "--node-monitor-grace-period=20s",
    ])  # fmt: skip
    spawn("kube-scheduler", [
        PROGRAMS / "kube-scheduler", f"--kubeconfig={FOLDER}/scheduler", "--leader-elect=false",
        "--bind-address=127.0.0.1",
    ])  # fmt: skip

