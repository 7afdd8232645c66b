"""Kills a cluster at random moments, and compares what the machine has before and after.

    leftovers.py DRIVER [ROUNDS]    half of the rounds kill the starter, half the starter and its watcher
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
HARNESS = ROOT / "tests/cluster/harness"
sys.path.append(str(HARNESS))

import isolation
from layout import BASE, RECORD, RUN

# Of the kernel's settings, those that change by themselves.
COUNTERS = [
    "fs/dentry-state", "fs/file-nr", "fs/inode-nr", "fs/inode-state", "fs/quota/", "kernel/ns_last_pid",
    "kernel/perf_event_max_sample_rate", "kernel/random/uuid", "net/netfilter/nf_conntrack_count",
]  # fmt: skip
# Folders that are compared with all that is in them.
TREES = ["/etc", "/opt", "/usr/libexec", "/usr/local/bin"]
# Folders whose entries are compared by name: other programs write below them.
FOLDERS = ["/", "/run", "/var", "/var/lib", "/var/log", "/root"]
# Seconds until nothing of a killed cluster is left.
PATIENCE = 30


def settings():
    """Every setting of the kernel that can be read."""
    found = {}
    for folder, _, names in os.walk("/proc/sys"):
        for path in (os.path.join(folder, name) for name in names):
            if path.removeprefix("/proc/sys/").startswith(tuple(COUNTERS)):
                continue
            try:
                found[path] = pathlib.Path(path).read_bytes()
            except OSError:
                continue
    return found


def files(folder):
    """Each file of a folder, with what a change of it would change."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for path in (os.path.join(parent, name) for name in folders + names):
            status = os.lstat(path)
            found[path] = (status.st_ino, status.st_mode, status.st_uid, status.st_size, status.st_mtime_ns)
    return found


def processes():
    """Processes that a cluster has started, by the folder that all of them name."""
    found = set()
    for line in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = line.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if (str(BASE) in text or str(HARNESS) in text) and int(line.parent.name) != os.getpid():
            found.add(line.parent.name)
    return found


def state():
    cgroups = [path for path, _, _ in os.walk("/sys/fs/cgroup") if isolation.CGROUP in path]
    return {
        # With them namespaces that a mount keeps.
        "mounts": pathlib.Path("/proc/self/mountinfo").read_text(),
        "links": sorted(os.listdir("/sys/class/net")),
        # With them the processes of containers, whose cgroup cannot be removed before they end.
        "cgroups": cgroups,
        "settings": settings(),
        "processes": processes(),
        "remains": [str(path) for path in (RUN, RECORD) if path.exists()],
        "files": {folder: files(folder) for folder in TREES},
        "folders": {folder: sorted(os.listdir(folder)) for folder in FOLDERS},
    }


def difference(before, after):
    """What of a state has changed, in words."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        parts = [(key, difference(before.get(key), after.get(key))) for key in keys if before.get(key) != after.get(key)]
        return "; ".join(f"{key}: {part}" for key, part in parts)
    return f"{before!r} before, {after!r} now"


def start(driver, command):
    return subprocess.Popen(
        [sys.executable, HARNESS, driver, *command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip


def watcher_of(starter):
    """The starter's child that watches it."""
    for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = status.read_text().rpartition(")")[2].split()[1]
            if parent == str(starter.pid) and b"watch" in (status.parent / "cmdline").read_bytes():
                return int(status.parent.name)
        except OSError:
            continue
    return None


def main(driver, rounds="10"):
    before = state()
    for number in range(int(rounds)):
        starter = start(driver, ["sleep", "600"])
        moment = random.uniform(0.2, 45)
        time.sleep(moment)
        both = number % 2 == 1
        if both and (watcher := watcher_of(starter)):
            os.kill(watcher, signal.SIGKILL)
        starter.kill()
        starter.wait()
        began = time.monotonic()
        if both:
            # The next start cleans up.
            start(driver, ["true"]).wait()
            began = time.monotonic()
        while (now := state()) != before:
            if time.monotonic() > began + PATIENCE:
                raise SystemExit(f"left after {PATIENCE} s: {difference(before, now)}")
            time.sleep(0.2)
        who = "starter and watcher" if both else "starter"
        print(f"{who} killed after {moment:.1f} s: clean after {time.monotonic() - began:.1f} s", flush=True)


main(*sys.argv[1:])
