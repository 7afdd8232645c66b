"""Nodes: containerd and a kubelet in namespaces of their own, which lie in the cluster's.

A node's root is the machine's, read-only. What a node writes is under its folder: /var/lib, /var/log, and what it
changes of /etc. /run is lost when it crashes, as at a reboot.
"""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid

from control_plane import kubeconfig
from isolation import (
    join_cgroups, leave_root_cgroup, make_cgroups, mount_cgroups, run, wait_until,
)  # fmt: skip
from layout import (
    AUTHORITY, CONTROL_PLANE, LOGS, PROGRAMS, node_address, node_folder, node_number,
)  # fmt: skip

CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
KUBELET_CONFIGURATION = f"""
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
# The only caller is the API server; the node's network reaches nobody else.
authentication: {{anonymous: {{enabled: true}}, webhook: {{enabled: false}}}}
authorization: {{mode: AlwaysAllow}}
containerRuntimeEndpoint: unix://{CONTAINERD_SOCKET}
clusterDomain: cluster.local
clusterDNS: [{CONTROL_PLANE}]
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
enforceNodeAllocatable: [none]
makeIPTablesUtilChains: false
maxPods: 200
# Taken away by the driver, once it can serve pods.
registerWithTaints: [{{key: oci.custom.io/agent-not-ready, effect: NoExecute}}]
volumePluginDir: /var/lib/kubelet/volume-plugins
# The machine's disk and memory are others' too.
evictionHard:
  {{imagefs.available: 0%, imagefs.inodesFree: 0%, nodefs.available: 0%, nodefs.inodesFree: 0%, memory.available: 0%}}
imageGCHighThresholdPercent: 100
"""
CONTAINERD_CONFIGURATION = f"""
version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = [
    "io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.erofs",
    "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.opt",
]
[grpc]
address = "{CONTAINERD_SOCKET}"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "registry.k8s.io/pause:3.10"
[plugins."io.containerd.cri.v1.runtime"]
enable_unprivileged_ports = false
enable_unprivileged_icmp = false
restrict_oom_score_adj = true
disable_apparmor = true
disable_hugetlb_controller = true
tolerate_missing_hugetlb_controller = true
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{PROGRAMS}"]
conf_dir = "/etc/cni/net.d"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "{PROGRAMS}/oci-runtime"
SystemdCgroup = false
"""


def add(name):
    """Makes a node and starts it."""
    number = node_number(name)
    folder = node_folder(name)
    for part in ("lib/kubelet", "log", "etc/containerd", "etc/cni/net.d", "etc-work"):
        (folder / part).mkdir(parents=True)
    (folder / "kubeconfig").write_text(kubeconfig(f"{name}-token"))
    (folder / "kubelet.yaml").write_text(KUBELET_CONFIGURATION)
    (folder / "etc/containerd/config.toml").write_text(CONTAINERD_CONFIGURATION)
    (folder / "etc/resolv.conf").write_text(f"nameserver {CONTROL_PLANE}\n")
    (folder / "etc/hosts").write_text(f"127.0.0.1 localhost\n{node_address(name)} {name}\n")
    (folder / "etc/cni/net.d/10-bridge.conflist").write_text(f"""
{{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {{"type": "bridge", "bridge": "pods0", "isGateway": true, "hairpinMode": true, "ipam": {{"type": "host-local",
    "ranges": [[{{"subnet": "10.244.{number}.0/24"}}]], "routes": [{{"dst": "0.0.0.0/0"}}]}}}}]}}
""")
    start(name)


def start(name):
    """Starts a node that was added, also after a crash."""
    number = node_number(name)
    cgroups = make_cgroups(name)
    with open(LOGS / f"{name}.log", "a") as log:
        process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "--net", "--uts", "--ipc", "--cgroup", "--pid", "--fork",
             "--kill-child", "--mount-proc", sys.executable, str(pathlib.Path(__file__).parent), "node-init", name],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            preexec_fn=lambda: join_cgroups(cgroups),
        )  # fmt: skip
    (node_folder(name) / "pid").write_text(str(process.pid))
    wait_until(f"the namespaces of {name}", lambda: network_of(process.pid) != network_of("self"))
    link = f"veth-{number}"
    run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", process.pid)
    run("ip", "link", "set", link, "master", "cluster0", "up")
    run("ip", "route", "replace", f"10.244.{number}.0/24", "via", node_address(name))


def network_of(process):
    return os.readlink(f"/proc/{process}/ns/net")


def first_process(name):
    """The node's first process: a child of the `unshare` that made its namespaces."""
    parent = (node_folder(name) / "pid").read_text()
    for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            if status.read_text().rpartition(")")[2].split()[1] == parent:
                return int(status.parent.name)
        except OSError:
            continue
    raise SystemExit(f"{name} does not run")


def crash(name):
    """Kills all processes of a node at once; its mounts and /run go with them."""
    process = int((node_folder(name) / "pid").read_text())
    init = first_process(name)
    os.kill(init, signal.SIGKILL)
    wait_until(f"the end of {name}", lambda: not pathlib.Path(f"/proc/{init}").exists())
    wait_until(f"the end of {name}", lambda: not is_alive(process))


def is_alive(process):
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def remove(name):
    """Ends a node for good, as a machine that is taken away."""
    crash(name)
    shutil.rmtree(node_folder(name))


def enter(name, command):
    """Runs a command on a node; replaces this process."""
    arguments = ["nsenter", "--target", str(first_process(name)), "--all", "--wd=/"]
    os.execvp("nsenter", [*arguments, *(command or [os.environ.get("SHELL", "/bin/sh")])])


def restart(name, program):
    """Kills one program of a node, which the node's first process starts again."""
    if program not in ("containerd", "kubelet"):
        raise SystemExit("what can be restarted is containerd and kubelet")
    folder = node_folder(name)
    before = (folder / f"{program}.pid").read_text()
    run("nsenter", "--target", first_process(name), "--all", "kill", "-KILL", before)
    wait_until(f"{program} of {name}", lambda: (folder / f"{program}.pid").read_text() not in ("", before))


def isolate(name):
    """Makes the node's view of files, cgroups and the network."""
    folder = node_folder(name)
    mount_cgroups()
    leave_root_cgroup()
    run("mount", "-t", "tmpfs", "-o", "mode=755", "run", "/run")
    for part, place in (("lib", "/var/lib"), ("log", "/var/log")):
        run("mount", "--bind", folder / part, place)
    layers = f"lowerdir=/etc,upperdir={folder}/etc,workdir={folder}/etc-work"
    run("mount", "-t", "overlay", "-o", layers, "etc", "/etc")
    pathlib.Path("/run/lock").mkdir()
    # The node's folder stays writable where it lies: a bind mount of its own.
    run("mount", "--bind", folder, folder)
    run("mount", "--bind", LOGS, LOGS)
    run("mount", "-o", "remount,bind,ro", "/")
    # A pod sees the driver's mounts when the root is shared, as systemd makes it.
    run("mount", "--make-rshared", "/")
    pathlib.Path("/run/boot-id").write_text(f"{uuid.uuid4()}\n")
    socket.sethostname(name)
    wait_until("a network interface", lambda: pathlib.Path("/sys/class/net/eth0").exists())
    run("ip", "link", "set", "lo", "up")
    run("ip", "address", "add", f"{node_address(name)}/24", "dev", "eth0")
    run("ip", "link", "set", "eth0", "up")
    run("ip", "route", "add", "default", "via", CONTROL_PLANE)
    pathlib.Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


# The kubelet sets these, which have no namespace: it sees files in their place. Only the kubelet does, since pods with
# users of their own may mount /proc only if no part of the node's is hidden.
KUBELET_SCRIPT = """
mount --make-private /proc
for name in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops \\
    kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
    mkdir -p "/run/settings/$(dirname "$name")"
    cat "/proc/sys/$name" > "/run/settings/$name"
    mount --bind "/run/settings/$name" "/proc/sys/$name"
done
mount --bind /run/boot-id /proc/sys/kernel/random/boot_id
exec "$@"
"""


def init(name):
    """The first process of a node: starts containerd and the kubelet, and starts them again when they end."""
    isolate(name)
    folder = node_folder(name)
    environment = {
        **os.environ,
        "SSL_CERT_FILE": str(AUTHORITY),
        "CONTAINERD_DISABLE_IGZIP": "1",
        "CONTAINERD_DISABLE_PIGZ": "1",
        "TMPDIR": "/run",
    }
    commands = {
        "containerd": [PROGRAMS / "containerd", "--config=/etc/containerd/config.toml"],
        "kubelet": [
            "unshare", "--mount", "--propagation", "unchanged", "sh", "-euc", KUBELET_SCRIPT, "kubelet",
            PROGRAMS / "kubelet", f"--config={folder}/kubelet.yaml", f"--kubeconfig={folder}/kubeconfig",
            f"--hostname-override={name}", f"--node-ip={node_address(name)}",
        ],
    }  # fmt: skip
    running = {}

    def launch(program):
        with open(LOGS / f"{name}-{program}.log", "a") as log:
            process = subprocess.Popen(
                [str(word) for word in commands[program]],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip
        running[process.pid] = program
        (folder / f"{program}.pid").write_text(str(process.pid))

    launch("containerd")
    wait_until("containerd", pathlib.Path(CONTAINERD_SOCKET).exists)
    launch("kubelet")
    while True:
        # Orphans of containers are children of this process too.
        ended, _ = os.wait()
        if program := running.pop(ended, None):
            time.sleep(1)
            launch(program)
