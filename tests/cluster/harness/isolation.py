"""Namespaces, cgroups and what ends them: nothing of a cluster outlives the process that started it.

    starter ── unshare ── init, process 1 of the cluster's namespaces ── control plane, nodes, the command
       └────── watcher, in a session of its own

The kernel kills `unshare` when the starter dies and init when `unshare` does, and with init every process of its
namespace; mounts and links go with the last of them. Cgroups, kernel settings and folders are left: the watcher sees
that the starter is gone and undoes them, and where it was killed too, the next start does.
"""

import ctypes
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

from layout import BASE, LOCK, RECORD, RUN

# Settings without a namespace that the driver changes where `node.leases` is Disable.
SETTINGS = ["fs/leases-enable"]
# One for each folder: clusters of two checkouts do not meet.
CGROUP = f"csi-driver-oci-cluster-{hashlib.sha256(str(BASE).encode()).hexdigest()[:8]}"
PR_SET_PDEATHSIG = 1


def run(*command, **options):
    """Runs a program to its end; what it printed is part of the error."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def wait_until(what, is_true, seconds=60):
    """Asks until the answer is true."""
    end = time.monotonic() + seconds
    while not (answer := is_true()):
        if time.monotonic() > end:
            raise RuntimeError(f"{what}: not within {seconds} s")
        time.sleep(0.05)
    return answer


def killed_with_parent():
    """For `preexec_fn`: the kernel kills the process when its parent dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def own_cgroups():
    """The kind, mount point, controllers and this process's cgroup of each hierarchy."""
    paths = {}
    for line in pathlib.Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        paths[frozenset(filter(None, controllers.split(",")))] = path
    # By mount point: what is mounted over another one is what counts.
    found = {}
    for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ")[:3]
        root, mount = fields.split(" ")[3:5]
        if kind not in ("cgroup", "cgroup2"):
            continue
        options = set(options.split(",")) if kind == "cgroup" else set()
        for controllers, path in paths.items():
            if controllers <= options and bool(controllers) == (kind == "cgroup"):
                names = ",".join(sorted(controllers))
                found[mount] = (kind, pathlib.Path(mount), names, os.path.relpath(path, root))
    return list(found.values())


def make_cgroups(name):
    """Makes a cgroup in each hierarchy, beneath this process's; returns them.

    With version 2 it is beneath the root, which alone may have both processes and controllers for its children.
    """
    made = []
    for kind, mount, _, path in own_cgroups():
        folder = (mount / path if kind == "cgroup" else mount) / name
        folder.mkdir(exist_ok=True)
        # Empty in a new one, which then takes no process.
        for file in ("cpuset.cpus", "cpuset.mems"):
            if kind == "cgroup" and (folder / file).exists():
                (folder / file).write_text((folder.parent / file).read_text())
        made.append(folder)
    return made


def join_cgroups(folders, process=0):
    for folder in folders:
        (folder / "cgroup.procs").write_text(str(process))


def mount_cgroups():
    """Mounts each hierarchy such that the process's cgroup, of which the namespace is, is its root."""
    hierarchies = own_cgroups()
    run("mount", "-t", "sysfs", "sysfs", "/sys")
    if [kind for kind, *_ in hierarchies] == ["cgroup2"]:
        run("mount", "-t", "cgroup2", "cgroup2", "/sys/fs/cgroup")
        return
    run("mount", "-t", "tmpfs", "-o", "mode=755", "cgroup", "/sys/fs/cgroup")
    for kind, mount, controllers, _ in hierarchies:
        mount.mkdir()
        run("mount", "-t", kind, *(["-o", controllers] if kind == "cgroup" else []), kind, mount)
        for controller in controllers.split(","):
            link = mount.parent / controller
            if kind == "cgroup" and "=" not in controller and not link.exists():
                link.symlink_to(mount.name)


def leave_root_cgroup():
    """With version 2, only a cgroup without processes gives controllers to its children."""
    root = pathlib.Path("/sys/fs/cgroup")
    controllers = root / "cgroup.controllers"
    if controllers.exists():
        (root / "system").mkdir(exist_ok=True)
        for process in (root / "cgroup.procs").read_text().split():
            join_cgroups([root / "system"], process)
        for controller in controllers.read_text().split():
            (root / "cgroup.subtree_control").write_text(f"+{controller}")


def setting(name):
    return pathlib.Path("/proc/sys") / name


def record():
    """Writes down what is to be undone, before anything is done. Returns the cgroups."""
    cgroups = [
        (mount / path if kind == "cgroup" else mount) / CGROUP for kind, mount, _, path in own_cgroups()
    ]
    settings = {name: setting(name).read_text() for name in SETTINGS if setting(name).exists()}
    RECORD.write_text(json.dumps({"cgroups": [str(folder) for folder in cgroups], "settings": settings}))
    return make_cgroups(CGROUP)


def lock(seconds):
    """Takes the lock of the folder, which is held as long as the returned file is open anywhere."""
    BASE.mkdir(parents=True, exist_ok=True)
    file = open(LOCK, "w")

    def try_once():
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False

    try:
        wait_until("the lock", try_once, seconds)
    except RuntimeError:
        raise SystemExit(f"another cluster runs in {BASE}") from None
    return file


def clean_up():
    """Undoes what a run did outside of its namespaces. Its processes are killed first, if any are left."""
    if RECORD.exists():
        what = json.loads(RECORD.read_text())
        for folder in map(pathlib.Path, what["cgroups"]):
            remove_cgroup(folder)
        for name, value in what["settings"].items():
            if setting(name).read_text() != value:
                setting(name).write_text(value)
    if RUN.exists():
        shutil.rmtree(RUN)
    RECORD.unlink(missing_ok=True)


def remove_cgroup(folder):
    if not folder.exists():
        return
    folders = [pathlib.Path(path) for path, _, _ in os.walk(folder, topdown=False)]

    def is_empty():
        left = [process for one in folders for process in (one / "cgroup.procs").read_text().split()]
        for process in left:
            try:
                os.kill(int(process), signal.SIGKILL)
            except ProcessLookupError:
                pass
        return not left

    wait_until(f"the end of the processes in {folder}", is_empty, 20)
    for one in folders:
        wait_until(f"the removal of {one}", lambda: not one.exists() or try_rmdir(one), 5)


def try_rmdir(folder):
    try:
        folder.rmdir()
        return True
    except OSError:
        return False
