"""A CustomPrometheus through its life: its Composition evaluated beside a cluster that plays its part step by step.

The StatefulSet's controller, the kubelet and the controller of ArtifactPreloads act only when they are told to, so that
every state between two steps is looked at, and each can be down.
"""

import copy
import json

import compose
import render

PLAIN = "customprometheus"
GATED = "customprometheus-gated"
COMPOSITIONS = (PLAIN, GATED)
# What the registry has: tag -> digest.
PUSHED = {f"v{number}": "sha256:" + f"{number}" * 64 for number in range(1, 4)}


def mounted(statefulset):
    """The reference of the artifact that a pod of this template mounts."""
    (source,) = [
        volume["csi"]["volumeAttributes"]
        for volume in statefulset["spec"]["template"]["spec"]["volumes"]
        if volume["name"] == "artifact"
    ]
    if "reference" in source:
        return source["reference"]
    digest = f"@{source['digest']}" if "digest" in source else ""
    return f"{source['repository']}:{source['tag']}{digest}"


class Cluster:
    """The namespace of one object; `objects` has what is composed, by name, as the API server has it."""

    def __init__(self, composition, **spec):
        self.composition = composition
        self.xr = render.example()
        self.xr["spec"] |= {"version": "v1", "replicas": 2} | spec
        self.objects = {}
        # Of each pod: the reference that it mounts, its revision, and whether it is ready.
        self.pods = []
        self.conditions = {}

    # What is asked for, and what is seen.

    def change(self, **spec):
        self.xr["spec"] |= spec

    @property
    def repository(self):
        return self.xr["spec"]["ociRegistry"]

    @property
    def wanted(self):
        return f"{self.repository}:{self.xr['spec']['version']}"

    @property
    def synced(self):
        return self.conditions["Synced"][0]

    @property
    def ready(self):
        return self.conditions["Ready"][0]

    @property
    def running(self):
        return self.xr.get("status", {}).get("reference", "")

    @property
    def artifact(self):
        return self.xr.get("status", {}).get("artifact", "")

    # Who acts.

    def reconcile(self):
        """Crossplane: composes, and applies what is composed."""
        result = compose.reconcile(self.composition, self.xr, copy.deepcopy(self.objects))
        self.conditions |= result.conditions
        if not self.synced:
            return
        for name in set(self.objects) - set(result.desired):
            self.delete(name)
        for name, desired in result.desired.items():
            self.apply(name, desired)
        self.xr["status"] = result.status

    def apply(self, name, desired):
        """The API server: a changed specification is another generation."""
        document = copy.deepcopy(desired)
        if document["kind"] == "Service":
            document["spec"].setdefault("clusterIP", "10.96.0.7")
        before = self.objects.get(name, {"metadata": {"generation": 0}})
        generation = before["metadata"]["generation"]
        changed = before.get("spec") != document.get("spec")
        document["metadata"]["generation"] = generation + 1 if changed or not generation else generation
        if "status" in before:
            document["status"] = before["status"]
        self.objects[name] = document

    def delete(self, name):
        self.objects.pop(name, None)
        if name == "statefulset":
            self.pods = []

    def preload(self, reason):
        """The controller of ArtifactPreloads has looked, and this is what it says."""
        artifact = self.objects.get("artifact")
        if not artifact:
            return
        before = artifact.get("status", {}).get("readyReference")
        version = artifact["spec"]["reference"].rpartition(":")[2]
        digest = PUSHED.get(version, "sha256:" + "0" * 64)
        self.objects["artifact"] = compose.preloaded(artifact, digest, reason, before)

    def revision(self):
        template = self.objects["statefulset"]["spec"]["template"]
        return json.dumps(template, sort_keys=True)

    def see(self):
        """The StatefulSet's controller has seen it; no pod is replaced yet."""
        statefulset = self.objects.get("statefulset")
        if not statefulset:
            return
        replicas = statefulset["spec"]["replicas"]
        del self.pods[replicas:]
        while len(self.pods) < replicas:
            self.pods.append((mounted(statefulset), self.revision(), False))
        self.tell()

    def tell(self):
        statefulset = self.objects["statefulset"]
        before, revision = statefulset.get("status", {}), self.revision()
        updated = sum(pod[1] == revision for pod in self.pods)
        ready = sum(pod[2] for pod in self.pods)
        current = before.get("currentRevision", revision)
        if updated == ready == len(self.pods):
            current = revision
        status = {
            "observedGeneration": statefulset["metadata"]["generation"],
            "replicas": len(self.pods),
            "readyReplicas": ready,
            "updatedReplicas": updated,
            "currentReplicas": sum(pod[1] == current for pod in self.pods),
            "currentRevision": current,
            "updateRevision": revision,
        }
        # Kubernetes leaves out numbers of none, but for replicas.
        statefulset["status"] = {
            key: value for key, value in status.items() if value or key == "replicas"
        }

    def replace(self):
        """One pod of an earlier revision is deleted, and comes back as the template has it now."""
        statefulset = self.objects.get("statefulset")
        if not statefulset:
            return
        revision = self.revision()
        earlier = [index for index, pod in enumerate(self.pods) if pod[1] != revision]
        # The next one has to wait for the last one, and begins at the end.
        unready = [pod for pod in self.pods if pod[1] == revision and not pod[2]]
        if earlier and not unready:
            self.pods[earlier[-1]] = (mounted(statefulset), revision, False)
        self.see()

    def start(self):
        """The kubelet: every pod becomes ready whose artifact there is."""
        digests = PUSHED.values()
        self.pods = [
            (reference, revision, ready or self.exists(reference, digests))
            for reference, revision, ready in self.pods
        ]
        if "statefulset" in self.objects:
            self.tell()

    def exists(self, reference, digests):
        name, _, digest = reference.removeprefix(self.repository).partition("@")
        return digest in digests if digest else name.removeprefix(":") in PUSHED

    def settle(self):
        """Everything does its work, until nothing changes any more."""
        for _ in range(40):
            before = copy.deepcopy((self.objects, self.pods, self.conditions, self.xr))
            self.reconcile()
            self.see()
            self.replace()
            self.start()
            version = self.xr["spec"]["version"]
            self.preload("Ready" if version in PUSHED else "ReferenceNotFound")
            if before == (self.objects, self.pods, self.conditions, self.xr):
                return
        raise AssertionError(f"{self.composition} never settles")


def never_ready():
    """Compositions whose object never becomes READY, though all that is composed runs."""
    for composition in COMPOSITIONS:
        cluster = Cluster(composition)
        cluster.settle()
        for condition, (status, message) in cluster.conditions.items():
            if not status:
                yield f"{composition}: {condition} is False: {message}"
