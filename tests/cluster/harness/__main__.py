"""A Kubernetes cluster of two nodes in namespaces, for trying things by hand and for tests.

    harness PROGRAM [COMMAND...]   starts it with this program as the driver, runs the command (a shell), and ends it
    harness --api-server COMMAND...   starts an API server only, without nodes and controllers
    harness node VERB NAME ...     what `node` does in that shell
"""

import asyncio
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import control_plane
import driver
import isolation
import nodes
import registries
from isolation import run, wait_until
from layout import AUTHORITY, BASE, KUBECONFIG, LOGS, PACKAGES, PROGRAMS, RUN, SLOW_RATE

HARNESS = str(pathlib.Path(__file__).parent)
NODES = ("node-1", "node-2")
NODE_USAGE = """usage: node add NAME                        makes a node and starts it: node-3 to node-9
       node crash NAME                      kills all its processes, as a power failure does
       node start NAME                      starts it again after a crash
       node remove NAME                     ends it for good
       node restart NAME kubelet|containerd
       node enter NAME [COMMAND...]         runs a command, or a shell, on the node"""


def main():
    match sys.argv[1:]:
        case ["watch"]:
            watch()
        case ["init", program, *command]:
            init(program, command)
        case ["serve"]:
            asyncio.run(registries.serve())
        case ["node-init", name]:
            nodes.init(name)
        case ["node", *arguments]:
            node(arguments)
        case [program, *command]:
            start(program, command)
        case _:
            raise SystemExit(__doc__)


def start(program, command):
    """Starts the cluster in namespaces of its own, and ends with the command's exit code."""
    if os.getuid() != 0:
        raise SystemExit("a cluster needs root: namespaces, mounts and cgroups")
    lock = isolation.lock(30)
    isolation.clean_up()
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    RUN.mkdir()
    cgroups = isolation.record()
    # It has the lock and the reading end: when the starter is gone, it reads the end of the file.
    reading, writing = os.pipe()
    subprocess.Popen(
        [sys.executable, HARNESS, "watch"],
        stdin=reading, pass_fds=[lock.fileno()], start_new_session=True,
    )  # fmt: skip
    os.close(reading)

    def join():
        isolation.killed_with_parent()
        isolation.join_cgroups(cgroups)

    process = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "--net", "--ipc", "--uts", "--cgroup", "--pid", "--fork",
         "--kill-child", "--mount-proc", sys.executable, HARNESS, "init", program, *command],
        preexec_fn=join,
    )  # fmt: skip
    # The terminal's interrupts are the command's.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: process.kill())
    code = process.wait()
    isolation.clean_up()
    sys.exit(code if code >= 0 else 128 - code)


def watch():
    """Waits for the end of the starter, then undoes what it left."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.read(0, 1)
    isolation.clean_up()


def spawn(name, command, **environment):
    """Starts a program that ends with the cluster; its output goes to a log."""
    with open(LOGS / f"{name}.log", "w") as log:
        subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=RUN,
            env={**os.environ, **environment},
        )  # fmt: skip


def init(program, command):
    """The first process: starts all, runs the command, and with it all ends."""
    began = time.monotonic()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    make_environment()
    isolation.mount_cgroups()
    isolation.leave_root_cgroup()
    control_plane.make_network()
    if program == "--api-server":
        control_plane.start_api_server(spawn)
    else:
        start_cluster(pathlib.Path(program))
    print(f"ready after {time.monotonic() - began:.0f} s; logs are in {LOGS}", file=sys.stderr)
    if not command:
        print(HELP, file=sys.stderr)
        command = [os.environ.get("SHELL", "/bin/sh")]
    process = subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while True:
        # Also for orphans, whose parent the first process becomes.
        ended, status = os.wait()
        if ended == process.pid:
            code = os.waitstatus_to_exitcode(status)
            sys.exit(code if code >= 0 else 128 - code)


def start_cluster(program):
    """Starts all of a cluster with this program as the driver."""
    with ThreadPoolExecutor() as threads:
        plane = threads.submit(control_plane.start, spawn)
        registries.start(spawn)
        images = threads.submit(push_images, program)
        plane.result()
        for name in NODES:
            nodes.add(name)
        images.result()
    # Until then they have a taint, of which the scheduler warns.
    wait_until("ready nodes", are_ready)
    driver.install()
    wait_for_nodes(NODES)


HELP = """A cluster with node-1 and node-2, and the driver from the chart.
  kubectl, helm, oras and crane    know the cluster and the registries
  registry.example.com             also as docker.io, ghcr.io, gcr.io, nvcr.io and registry.k8s.io
  private.example.com              the same content; user robot, password correct-password
  slow.example.com                 the same content, as fast as $SLOW_RATE_FILE says, in bytes a second
  node                             adds, enters, crashes nodes
All of it ends with this shell."""


def make_environment():
    """What the command and the programs of the cluster find."""
    commands = RUN / "bin"
    commands.mkdir()
    script = commands / "node"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{HARNESS}" node "$@"\n')
    script.chmod(0o755)
    os.environ.update(
        PATH=f"{commands}:{PROGRAMS}:{os.environ['PATH']}",
        PYTHONDONTWRITEBYTECODE="1",
        KUBECONFIG=str(KUBECONFIG),
        SSL_CERT_FILE=str(AUTHORITY),
        DOCKER_CONFIG=str(RUN / "docker"),
        SLOW_RATE_FILE=str(SLOW_RATE),
        CLUSTER_LOGS=str(LOGS),
        CLUSTER_RUN=str(RUN),
    )
    for name, value in (("HELM_CACHE_HOME", "cache"), ("HELM_CONFIG_HOME", "config"), ("HELM_DATA_HOME", "data")):
        os.environ[name] = str(RUN / "helm" / value)
    # Names of registries are asked of the cluster's own server.
    for name, text in (("resolv.conf", "nameserver 198.51.100.1\n"), ("hosts", "127.0.0.1 localhost\n")):
        (RUN / name).write_text(text)
        run("mount", "--bind", RUN / name, f"/etc/{name}")


def push_images(program):
    busybox = registries.busybox_files(next(PACKAGES.glob("*/bin/busybox"), None) or PACKAGES / "bin/busybox")
    # The real image has it, and Debian's busybox does not.
    busybox.update(registries.program_files("flock"))
    registries.push_image("docker.io/library/busybox:1.37", busybox, [], ["sh"])
    # Waits, and ends when it is told to: what a sandbox needs.
    wait = "trap exit INT TERM; while :; do sleep 3600 & wait $!; done"
    registries.push_image("registry.k8s.io/pause:3.10", busybox, ["sh", "-c", wait])
    driver.push(program)
    driver.push_earlier()


def are_ready():
    try:
        run("kubectl", "wait", "nodes", *NODES, "--for=condition=Ready", "--timeout=5s")
        return True
    except RuntimeError:
        return False


def wait_for_nodes(names):
    """Returns when the driver is registered on these nodes."""

    def is_registered(name):
        try:
            node = json.loads(run("kubectl", "get", "csinode", name, "--output=json"))
        except RuntimeError:
            return False
        return any(one["name"] == "oci.custom.io" for one in node["spec"]["drivers"] or [])

    for name in names:
        wait_until(f"the driver on {name}", lambda: is_registered(name), 120)


def node(arguments):
    """The command `node`."""
    match arguments:
        case ["add", name]:
            nodes.add(name)
        case ["crash", name]:
            nodes.crash(name)
        case ["start", name]:
            nodes.start(name)
        case ["remove", name]:
            nodes.remove(name)
        case ["restart", name, program]:
            nodes.restart(name, program)
        case ["enter", name, *command]:
            nodes.enter(name, command)
        case _:
            raise SystemExit(NODE_USAGE)


main()
