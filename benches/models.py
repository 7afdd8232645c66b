"""Measures pods with models on one node: the driver, and `oras pull` in an init container.

    models.py DRIVER     called by `make bench-models`

All pods start at once, each with an artifact of its own in four shards. "Cold" is the first time on
the node. "Warm" are other pods with the same artifacts, after the first ones are gone: the driver
publishes from its cache, and the init container pulls again, because its emptyDir went with the pod.
Both programs write to the same disk, in turns, and the kernel's caches are empty before each cold run.
The registry, which would be another machine, reads next to nothing from that disk: all bytes of a
shard but the first are zeros, for which its files have holes. Neither program makes holes.

BENCH_MODELS (20), BENCH_MIB (1024) for each and BENCH_ROUNDS (3) make a quick run. The disk needs
the size of all models.
"""

import concurrent.futures
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

MODELS = int(os.environ.get("BENCH_MODELS", "20"))
MIB = int(os.environ.get("BENCH_MIB", "1024"))
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "3"))
SHARDS = [f"model-{number:05}-of-00004.safetensors" for number in range(1, 5)]
# The kubelet's own deadline for one mount.
DEADLINE_SECONDS = 119
# A call that has not ended at its deadline. The kubelet repeats it, and the pull goes on.
ABORTED = "10"


def run(*command, **options):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)


def wait_until(happens, process):
    while not happens():
        if process.poll() is not None:
            raise SystemExit(f"{process.args[0]} has ended")
        time.sleep(0.02)


def field(number, value):
    """Encodes one field of a protobuf message: a text, a message, or a small number."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    value = value.encode() if isinstance(value, str) else value
    length, size = len(value), b""
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + value


class Registry:
    """A registry with the models, as `oras push` writes them."""

    def __init__(self, room):
        self.host = "localhost:5056"
        configuration = room / "registry.yml"
        configuration.write_text(
            "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
            f"storage: {{filesystem: {{rootdirectory: {room}/registry}}}}\n"
            f"http: {{addr: '{self.host}'}}\n"
        )
        with open(room / "registry.log", "w") as log:
            self.process = subprocess.Popen(["docker-registry", "serve", configuration], stderr=log)

        def answers():
            try:
                return urllib.request.urlopen(f"http://{self.host}/v2/").status == 200
            except OSError:
                return False

        wait_until(answers, self.process)

    def push(self, folder):
        """Pushes all models. The shards differ in their first bytes, so no two have the same digest."""
        for model in range(MODELS):
            for number, shard in enumerate(SHARDS):
                with open(folder / shard, "wb") as file:
                    file.write(bytes([model + 1, number]))
                    file.truncate(MIB << 18)
            run("oras", "push", "--plain-http", self.reference(model), *SHARDS, cwd=folder)
            for blob in folder.parent.glob("registry/**/blobs/sha256/*/*/data"):
                if blob.stat().st_blocks * 512 > 1 << 20:
                    run("fallocate", "--dig-holes", blob)

    def reference(self, model):
        return f"{self.host}/models/example-{model}:v1"


class Driver:
    """A driver with an empty cache, called as the kubelet calls it."""

    name = "driver"

    def __init__(self, binary, room):
        self.folder = room / "node"
        self.socket = self.folder / "csi.sock"
        for name in ("kubelet/pods", "kubelet/plugins_registry", "calls"):
            (self.folder / name).mkdir(parents=True)
        configuration = self.folder / "configuration.yaml"
        configuration.write_text(
            "apiVersion: oci.custom.io/v1alpha1\nkind: NodeConfiguration\n"
            "cache: {minFreePercent: 0, minFreeInodesPercent: 0, highThresholdPercent: 100,"
            " lowThresholdPercent: 100}\n"
        )
        with open(self.folder / "log", "w") as log:
            self.process = subprocess.Popen(
                [binary, "node", "--node-id=bench", f"--endpoint=unix://{self.socket}"]
                + [f"--state-dir={self.folder}/state", f"--kubelet-dir={self.folder}/kubelet"]
                + [f"--{name}-endpoint=" for name in ("admin", "health", "metrics")]
                + [f"--config={configuration}"],
                stdout=log,
                stderr=log,
            )
        registrations = self.folder / "kubelet/plugins_registry"
        wait_until(lambda: any(registrations.iterdir()), self.process)

    def call(self, method, message):
        """Returns the seconds of a call. Repeats it after the deadline."""
        folder = pathlib.Path(tempfile.mkdtemp(dir=self.folder / "calls"))
        request, headers = folder / "request", folder / "headers"
        request.write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
        seconds = 0
        while True:
            answer = subprocess.run(
                ["curl", "--silent", "--show-error", "--http2-prior-knowledge"]
                + ["--unix-socket", self.socket, "--data-binary", f"@{request}"]
                + ["--header", "content-type: application/grpc", "--header", "te: trailers"]
                + ["--header", f"grpc-timeout: {DEADLINE_SECONDS}S", "--dump-header", headers]
                + ["--output", "/dev/null", "--write-out", "%{time_total}"]
                + [f"http://localhost/csi.v1.Node/{method}"],
                check=True,
                capture_output=True,
                text=True,
            )
            seconds += float(answer.stdout)
            lines = headers.read_text().splitlines()
            said = dict(line.split(": ", 1) for line in lines if ": " in line)
            if said["grpc-status"] == "0":
                return seconds
            if said["grpc-status"] != ABORTED:
                raise SystemExit(f"{method}: {said}")

    def target(self, pod):
        return self.folder / f"kubelet/pods/{pod}/volumes/kubernetes.io~csi/model/mount"

    def start(self, reference, pod):
        target = self.target(pod)
        target.parent.mkdir(parents=True)
        context = {
            "reference": reference,
            "csi.storage.k8s.io/ephemeral": "true",
            "csi.storage.k8s.io/pod.name": pod,
            "csi.storage.k8s.io/pod.namespace": "default",
            "csi.storage.k8s.io/pod.uid": pod,
            "csi.storage.k8s.io/serviceAccount.name": "default",
        }
        capability = field(2, b"") + field(3, field(1, 1))
        message = field(1, f"csi-{pod}") + field(4, str(target)) + field(5, capability)
        message += field(6, 1)
        for key, value in context.items():
            message += field(8, field(1, key) + field(2, value))
        return self.call("NodePublishVolume", message)

    def stop(self, pod):
        self.call("NodeUnpublishVolume", field(1, f"csi-{pod}") + field(2, str(self.target(pod))))

    def cpu_seconds(self):
        stat = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text()
        ticks = stat.rpartition(")")[2].split()
        return (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")

    def close(self):
        self.process.terminate()
        self.process.wait()
        # What is mounted still after a failure.
        for target in self.folder.glob("kubelet/pods/*/volumes/*/model/mount"):
            subprocess.run(["umount", "--lazy", target], check=False)
        shutil.rmtree(self.folder)


class InitContainers:
    """`oras pull` into the emptyDir of each pod. When content is on the disk is left to the kernel."""

    name = "oras pull"

    def __init__(self, _, room):
        self.folder = room / "empty-dirs"
        self.folder.mkdir()

    def start(self, reference, pod):
        started = time.monotonic()
        run("oras", "pull", "--plain-http", "--output", self.folder / pod, reference)
        return time.monotonic() - started

    def stop(self, pod):
        shutil.rmtree(self.folder / pod)

    def cpu_seconds(self):
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def close(self):
        shutil.rmtree(self.folder)


def at_once(function):
    """Calls a function for all models at once."""
    with concurrent.futures.ThreadPoolExecutor(MODELS) as pool:
        return list(pool.map(function, range(MODELS)))


def measure(program, registry, turn):
    """Starts all pods. Returns the times of the first, the median and the last one, the time until
    all content is on the disk, and CPU time."""
    before, started = program.cpu_seconds(), time.monotonic()
    pods = at_once(lambda model: program.start(registry.reference(model), f"{turn}-{model}"))
    cpu = program.cpu_seconds() - before
    run("sync", "-f", program.folder)
    synced = time.monotonic() - started
    at_once(lambda model: program.stop(f"{turn}-{model}"))
    return min(pods), statistics.median(pods), max(pods), synced, cpu


def main():
    binary = pathlib.Path(sys.argv[1]).resolve()
    # Not /tmp: it is often a tmpfs.
    room = pathlib.Path(tempfile.mkdtemp(prefix="csi-driver-oci-models.", dir="/var/tmp"))
    registry = None
    try:
        registry = Registry(room)
        folder = room / "push"
        folder.mkdir()
        registry.push(folder)
        figures = {}
        for number in range(ROUNDS):
            # Another one first in each round.
            for kind in [Driver, InitContainers][:: -1 if number % 2 else 1]:
                run("sync")
                pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
                program = kind(binary, room)
                try:
                    for turn in ("cold", "warm"):
                        rounds = figures.setdefault((turn, kind.name), [])
                        rounds.append(measure(program, registry, turn))
                finally:
                    program.close()
                print(f"round {number}: {kind.name} {figures}", file=sys.stderr)
        print(f"{MODELS} artifacts of {MIB} MiB, seconds, medians of {ROUNDS} rounds\n")
        print("| pods | program | first pod | median pod | last pod | all on the disk | CPU |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for (turn, name), rounds in sorted(figures.items()):
            medians = " | ".join(f"{statistics.median(column):.3g}" for column in zip(*rounds))
            print(f"| {turn} | {name} | {medians} |")
    finally:
        if registry:
            registry.process.terminate()
            registry.process.wait()
        shutil.rmtree(room, ignore_errors=True)


if __name__ == "__main__":
    main()
