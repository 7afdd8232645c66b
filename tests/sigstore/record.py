#!/usr/bin/env python3
"""Signs an artifact with real clients at a private Sigstore instance, and records what they push: record.py FOLDER

README.md describes the folder. Nothing of the instance runs afterwards.
"""

import json
import pathlib
import shutil
import sys
import tempfile
import urllib.error
import urllib.request

from instance import HERE, PROVENANCE, TARGET, Instance, Issuer, free_ports

BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PYTHON = TARGET / "sigstore/python/bin/sigstore"
WORKFLOW = "team/app/.github/workflows/release.yml@refs/heads/main"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# The claims of a job of GitHub Actions.
CLAIMS = {
    "sub": "repo:team/app:ref:refs/heads/main",
    "event_name": "push",
    "job_workflow_ref": WORKFLOW,
    "job_workflow_sha": COMMIT,
    "ref": "refs/heads/main",
    "repository": "team/app",
    "repository_id": "1",
    "repository_owner": "team",
    "repository_owner_id": "2",
    "repository_visibility": "public",
    "run_attempt": "1",
    "run_id": "3",
    "runner_environment": "github-hosted",
    "sha": COMMIT,
    "workflow": "Release",
    "workflow_ref": WORKFLOW,
    "workflow_sha": COMMIT,
}
NEWER = ["--signing-config", "signing_config.json"]
PREDICATE = {
    "buildDefinition": {"buildType": "https://example.com/build/v1", "externalParameters": {}},
    "runDetails": {"builder": {"id": "https://example.com/builder"}},
}


class Registry:
    """Debian's docker-registry, which has no referrers API: clients push an index under a tag instead."""

    def __init__(self, instance):
        (port,) = free_ports(1)
        self.host = f"{HERE}:{port}"
        storage = instance.folder / "registry"
        lines = f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {storage}}}}}\nhttp: {{addr: '{self.host}'}}\n"
        instance.write("registry.yml", lines)
        instance.start("docker-registry", f"http://{self.host}/v2/", "serve", "registry.yml")

    def get(self, repository, kind, name):
        """The bytes of a manifest or blob; None if there is none."""
        accept = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json"
        url = f"http://{self.host}/v2/{repository}/{kind}/{name}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": accept})) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise


class Recorder:
    """Lets one client after the other sign the same artifact, each in a repository of its own."""

    def __init__(self, instance, into):
        self.instance, self.into = instance, into
        self.registry = Registry(instance)

    def push(self, repository):
        """Pushes the artifact, and returns its reference with the digest."""
        tag = f"{self.registry.host}/{repository}:v1"
        self.instance.write("file.txt", "signed\n")
        created = "org.opencontainers.image.created=2026-11-30T00:00:00Z"
        self.instance.run("oras", "push", "--plain-http", "--annotation", created, tag, "file.txt")
        self.instance.run("oras", "manifest", "fetch", "--plain-http", "--output", "artifact.json", tag)
        return f"{tag.removesuffix(':v1')}@{self.instance.run('oras', 'resolve', '--plain-http', tag).strip()}"

    def cosign(self, command, repository, *arguments):
        """Signs or attests with cosign."""
        reference = self.push(repository)
        token = self.instance.issuer.token(CLAIMS)
        self.instance.run(
            "cosign", command, "--yes", "--allow-http-registry", "--trusted-root", "trusted_root.json",
            "--identity-token", token, *arguments, reference,
        )  # fmt: skip
        self.keep(repository, reference)

    def python(self, command, repository, *arguments):
        """Signs or attests the manifest with sigstore-python, and attaches the bundle."""
        reference = self.push(repository)
        self.instance.run(
            PYTHON, "--trust-config", "trust_config.json", command, "--identity-token",
            self.instance.issuer.token(CLAIMS), "--overwrite", "--bundle", "bundle.json", *arguments, "artifact.json",
        )  # fmt: skip
        self.instance.run("oras", "attach", "--plain-http", "--artifact-type", BUNDLE, reference, f"bundle.json:{BUNDLE}")
        self.keep(repository, reference)

    def keep(self, repository, reference):
        """Records the one manifest that a client has pushed, its configuration and its layer."""
        tag = reference.rpartition("@")[2].replace(":", "-")
        manifest = self.registry.get(repository, "manifests", f"{tag}.sig")
        if manifest is None:
            (referrer,) = json.loads(self.registry.get(repository, "manifests", tag))["manifests"]
            manifest = self.registry.get(repository, "manifests", referrer["digest"])
        content = json.loads(manifest)
        (layer,) = content["layers"]
        folder = self.into / repository
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "manifest.json").write_bytes(manifest)
        for name, descriptor in (("config.json", content["config"]), ("layer.json", layer)):
            (folder / name).write_bytes(self.registry.get(repository, "blobs", descriptor["digest"]))


def record(instance, into):
    recorder = Recorder(instance, into)
    instance.write("predicate.json", json.dumps(PREDICATE))
    older = [
        "--use-signing-config=false", "--new-bundle-format=false", "--fulcio-url", instance.ca, "--oidc-issuer",
        instance.issuer.url,
    ]  # fmt: skip
    recorder.cosign("sign", "cosign", *NEWER, "--annotations", "env=prod")
    recorder.cosign("attest", "cosign-attest", *NEWER, "--type", "slsaprovenance1", "--predicate", "predicate.json")
    recorder.cosign("sign", "attached-timestamp", *older, "--tlog-upload=false", "--timestamp-server-url", instance.tsa)
    recorder.cosign("sign", "attached-log", *older, "--rekor-url", instance.older_log)
    recorder.python("sign", "python")
    recorder.python("attest", "python-attest", "--predicate", "predicate.json", "--predicate-type", PROVENANCE)
    shutil.copy(instance.folder / "artifact.json", into)
    shutil.copy(instance.folder / "trusted_root.json", into)
    identity = {"issuer": instance.issuer.url, "subject": f"https://github.com/{WORKFLOW}"}
    (into / "identity.json").write_text(json.dumps(identity))


def main():
    into = pathlib.Path(sys.argv[1]).resolve()
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = pathlib.Path(name)
        with Issuer(folder) as issuer:
            # One after the other: a port of the timestamp authority is fixed.
            with Instance(folder / "other", issuer) as instance:
                Recorder(instance, into).cosign("sign", "other", *NEWER)
                shutil.copy(instance.folder / "trusted_root.json", into / "other_root.json")
            with Instance(folder / "one", issuer) as instance:
                record(instance, into)


if __name__ == "__main__":
    main()
