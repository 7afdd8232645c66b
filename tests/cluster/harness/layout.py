"""Where everything of a cluster is: folders, addresses, names."""

import os
import pathlib

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
BASE = (REPOSITORY / os.environ.get("CARGO_TARGET_DIR", "target")).resolve() / "cluster"
# Programs that tests/cluster/stack/build made.
PROGRAMS = BASE / "bin"
# Debian's packages, unpacked.
PACKAGES = BASE / "root"
# The driver and the tree of an earlier commit, for upgrades.
EARLIER = BASE / "earlier"
# What one run makes; removed when it ends.
RUN = BASE / "run"
# Logs of the last run, which stay.
LOGS = BASE / "logs/run"
# Held by whatever uses or cleans RUN.
LOCK = BASE / "lock"
# What is to be undone outside of RUN, written before it is done.
RECORD = BASE / "record.json"

KUBECONFIG = RUN / "kubeconfig"
AUTHORITY = RUN / "registry-ca.crt"
# Bytes a second of slow.example.com; read again for each piece that is sent.
SLOW_RATE = RUN / "slow-rate"

# A network for documentation, and none that the machine has: the cluster's own network namespace has no other.
NETWORK = "198.51.100.{}"
CONTROL_PLANE = NETWORK.format(1)
REGISTRY = NETWORK.format(2)
REGISTRY_WITH_USERS = NETWORK.format(3)
SLOW_REGISTRY = NETWORK.format(4)
# Services have no proxy here; this one is an address of the control plane.
SERVICES = "10.96.0.0/24"
API_SERVICE = "10.96.0.1"
ETCD = "http://127.0.0.1:2379"

# What the cluster's DNS server answers. The public names are those that examples and the runtime ask for.
NAMES = {
    **dict.fromkeys(
        ["registry.example.com", "registry-1.docker.io", "index.docker.io", "ghcr.io", "gcr.io", "nvcr.io"]
        + ["registry.k8s.io"],
        REGISTRY,
    ),
    "private.example.com": REGISTRY_WITH_USERS,
    "slow.example.com": SLOW_REGISTRY,
    "kubernetes.default.svc.cluster.local": API_SERVICE,
}
USER, PASSWORD = "robot", "correct-password"

# Tokens, since the API server is asked from this machine only. Nodes have theirs by name.
ADMINISTRATOR = "administrator-token"


def node_number(name):
    """The number of `node-N`, from 1 to 9, which its addresses are made of."""
    prefix, _, number = name.partition("-")
    if prefix != "node" or number not in "123456789" or len(number) != 1:
        raise SystemExit(f"{name} is no node: names are node-1 to node-9")
    return int(number)


def node_address(name):
    return NETWORK.format(10 + node_number(name))


def node_folder(name):
    return RUN / "nodes" / name
