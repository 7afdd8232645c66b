"""Packages the chart as a release has it, and pushes it as an OCI artifact: package.py FOLDER [REPOSITORY]

Its default image is then one that is published. The same tree gives the same bytes: SOURCE_DATE_EPOCH is the time of all
files. The client has the credentials of the docker configuration.
"""

import gzip
import io
import os
import pathlib
import shutil
import sys
import tarfile
import tempfile

import yaml
from helm_python.registry import RegistryClient

import chart

MARK = "oci.custom.io/released"


def texts():
    """Path in the package -> content of each file of the chart that a release has."""
    ignored = {line for line in (chart.CHART / ".helmignore").read_text().split() if line.endswith("/")}
    for path in sorted(chart.CHART.rglob("*")):
        name = path.relative_to(chart.CHART)
        if path.is_file() and f"{name.parts[0]}/" not in ignored:
            content = path.read_bytes()
            if name.name == "Chart.yaml":
                content = content.replace(f'{MARK}: "false"'.encode(), f'{MARK}: "true"'.encode())
            yield f"{chart.CHART.name}/{name}", content


def package(folder):
    """Writes the package, and checks that it renders by its own defaults."""
    about = yaml.safe_load((chart.CHART / "Chart.yaml").read_text())
    path = pathlib.Path(folder) / f"{about['name']}-{about['version']}.tgz"
    files = io.BytesIO()
    with tarfile.open(fileobj=files, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in texts():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), int(os.environ["SOURCE_DATE_EPOCH"])
            archive.addfile(entry, io.BytesIO(content))
    path.write_bytes(gzip.compress(files.getvalue(), mtime=0))
    with tempfile.TemporaryDirectory() as room:
        shutil.unpack_archive(path, room)
        rendered = chart.texts({}, path=pathlib.Path(room) / about["name"], image=None)
    (daemonset,) = chart.documents(rendered["daemonset.yaml"])
    image = daemonset["spec"]["template"]["spec"]["containers"][0]["image"]
    wanted = f"ghcr.io/csi-driver-oci/csi-driver-oci:{about['appVersion']}"
    if image != wanted:
        raise SystemExit(f"the package's default image is {image}, and not {wanted}")
    return path


def push(path, repository):
    with RegistryClient(plain_http=repository.startswith("localhost:")) as client:
        client.push(path, f"oci://{repository}")


if __name__ == "__main__":
    written = package(sys.argv[1])
    if sys.argv[2:]:
        push(written, sys.argv[2])
    print(written)
