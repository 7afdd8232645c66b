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

SETTINGS = [
    "fs/leases-enable", "vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes", "net/ipv4/ip_forward",
]  # fmt: skip
FOLDERS = ["/etc", "/run", "/var/lib", "/var/log", "/opt", "/root", "/usr/libexec"]


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
        "mounts": pathlib.Path("/proc/self/mountinfo").read_text(),
        "links": sorted(os.listdir("/sys/class/net")),
        "cgroups": cgroups,
        "settings": {name: isolation.setting(name).read_text() for name in SETTINGS if isolation.setting(name).exists()},
        "processes": processes(),
        "remains": [str(path) for path in (RUN, RECORD) if path.exists()],
        "files": {
            folder: sorted((entry.name, entry.stat(follow_symlinks=False).st_ino) for entry in os.scandir(folder))
            for folder in FOLDERS
            if os.path.isdir(folder)
        },
    }


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
        isolation.wait_until("nothing to be left", lambda: state() == before, 30)
        who = "starter and watcher" if both else "starter"
        print(f"{who} killed after {moment:.1f} s: clean after {time.monotonic() - began:.1f} s", flush=True)


main(*sys.argv[1:])
