"""deploy/base, which is what the chart renders to, less the labels that say that Helm manages it.

    plain.py --write     renders deploy/base anew
"""

import sys

import yaml

import chart

FOLDER = chart.ROOT / "deploy/base"
TEMPLATES = ["namespace", "serviceaccount", "csidriver", "daemonset"]
HEADER = "# Rendered from charts/csi-driver-oci with deploy/values.yaml by deploy/render.\n"
HELMS_OWN = ("helm.sh/chart:", "app.kubernetes.io/managed-by:")


def rendered():
    """Name of a file -> its text."""
    values = yaml.safe_load((chart.ROOT / "deploy/values.yaml").read_text())
    texts = chart.texts(values)
    files = {}
    for name in TEMPLATES:
        lines = texts.pop(f"{name}.yaml").strip().splitlines()
        kept = [
            line.rstrip() for line in lines if not line.strip().startswith(HELMS_OWN)
        ]
        files[f"{name}.yaml"] = HEADER + "\n".join(kept) + "\n"
    texts.pop("NOTES.txt")
    left = [name for name, text in texts.items() if text.strip()]
    if left:
        raise SystemExit(f"deploy/base has no place for {', '.join(left)}")
    return files


def differences():
    """Files that are not what the chart renders to."""
    return [
        name
        for name, text in rendered().items()
        if not (FOLDER / name).exists() or (FOLDER / name).read_text() != text
    ]


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(__doc__)
    for name, text in rendered().items():
        (FOLDER / name).write_text(text)
