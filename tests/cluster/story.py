"""A CustomPrometheus through its life: its Composition evaluated beside a cluster that plays its part step by step.

The StatefulSet's controller, the kubelet and the controller of ArtifactPreloads act only when they are told to, so that
every state between two steps is looked at, and each can be down.
"""

import copy
import json
import random

import chart
import compose
import render

PLAIN = "customprometheus"
GATED = "customprometheus-gated"
COMPOSITIONS = (PLAIN, GATED)
# What makes a scrape configuration wrong here.
WRONG = "scrape_intervall"
SCRAPES = ["- job_name: a\n", "- job_name: b\n", f"- job_name: a\n  {WRONG}: 1s\n"]
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


def version_of(reference):
    """The tag of a reference, which may have a digest too."""
    return reference.partition("@")[0].rpartition(":")[2]


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
        # Whether the artifacts have a promtool.
        self.promtool = True

    # What is asked for, and what is seen.

    def change(self, **spec):
        """Changes fields of the specification; one that is None is removed."""
        spec = self.xr["spec"] | spec
        self.xr["spec"] = {field: value for field, value in spec.items() if value is not None}

    @property
    def repository(self):
        return self.xr["spec"]["ociRegistry"]

    @property
    def wanted(self):
        spec = self.xr["spec"]
        digest = f"@{spec['digest']}" if "digest" in spec else ""
        return f"{self.repository}:{spec['version']}{digest}"

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

    def preload(self, reason, earlier=False):
        """The controller of ArtifactPreloads has looked, and this is what it says; `earlier` while the registry is down."""
        artifact = self.objects.get("artifact")
        if not artifact:
            return
        before = artifact.get("status", {}).get("readyReference")
        version = version_of(artifact["spec"]["reference"])
        digest = PUSHED.get(version, "sha256:" + "0" * 64)
        self.objects["artifact"] = compose.preloaded(artifact, digest, reason, before, earlier)

    def look(self):
        """The controller of ArtifactPreloads is up, the nodes too: what exists is on all of them at once."""
        if "artifact" in self.objects:
            version = version_of(self.objects["artifact"]["spec"]["reference"])
            self.preload("Ready" if version in PUSHED else "ReferenceNotFound")

    @property
    def preloaded(self):
        """The reference that all nodes hold by the present ArtifactPreload, whatever its status says."""
        artifact = self.objects.get("artifact", {"spec": {}})
        ready = compose.condition_is_true(artifact, "Ready")
        current = artifact.get("status", {}).get("reference") == artifact["spec"].get("reference")
        return artifact["spec"].get("reference") if ready and current else None

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

    def check(self):
        """The jobs that check a configuration have run."""
        for name, job in self.objects.items():
            if job["kind"] != "Job":
                continue
            volumes = job["spec"]["template"]["spec"]["volumes"]
            (volume,) = [each for each in volumes if each["name"] == "config"]
            (config,) = [
                each
                for each in self.objects.values()
                if each["metadata"]["name"] == volume["configMap"]["name"]
            ]
            wrong = WRONG in config["data"]["user-scrape.yml"]
            job["status"] = self.outcome("check-promtool" in name, wrong)

    def outcome(self, is_promtool, wrong):
        failed = {"failed": 2, "ready": 0, "conditions": [{"type": "Failed", "status": "True"}]}
        if wrong or (is_promtool and not self.promtool):
            return failed
        if is_promtool:
            return {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]}
        return {"active": 1, "ready": 1}

    @property
    def configured(self):
        """Whether the pods have the scrape configuration that is asked for."""
        scrape = "scrape_configs:\n  " + self.xr["spec"]["scrapeConfig"].replace("\n", "\n  ")
        config = self.objects.get("config", {"data": {}})["data"]
        return config.get("user-scrape.yml") == scrape

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
            self.look()
            self.check()
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


# The life of an object: what happens, and then what is seen. Crossplane reconciles after each step. A step that is for
# one Composition only says so; the other has nothing like it.

STEPS = [
    ("created", lambda it: None, None),
    ("the nodes fetch v1", lambda it: it.preload("Preloading"), GATED),
    ("all nodes hold v1", lambda it: it.preload("Ready"), GATED),
    ("its pods are there", Cluster.see, None),
    ("its pods are ready", Cluster.start, None),
    ("version: v2", lambda it: it.change(version="v2"), None),
    ("the nodes fetch v2", lambda it: it.preload("Preloading"), GATED),
    ("all nodes hold v2", lambda it: it.preload("Ready"), GATED),
    ("one pod is replaced", Cluster.replace, None),
    ("it is ready, and the other is replaced", lambda it: (it.start(), it.replace()), None),
    ("that is ready too", Cluster.start, None),
    ("version: v4, which does not exist", lambda it: it.change(version="v4"), None),
    ("the registry has no v4", lambda it: it.preload("ReferenceNotFound"), GATED),
    ("one pod is replaced, and starts if it can", lambda it: (it.replace(), it.start()), PLAIN),
    ("version: v2", lambda it: it.change(version="v2"), None),
    ("all nodes hold v2", lambda it: it.preload("Ready"), GATED),
    ("the pod is replaced, and ready", lambda it: (it.replace(), it.start()), PLAIN),
    ("version: v5, while the controller is down", lambda it: it.change(version="v5"), GATED),
    ("version: v2", lambda it: it.change(version="v2"), GATED),
    ("the controller is back", lambda it: it.preload("Ready"), GATED),
    ("digest: that of v1, version: v1, while the registry is down", lambda it: it.change(version="v1", digest=PUSHED["v1"]), None),
    ("the controller hands out its earlier answer", lambda it: it.preload("Ready", earlier=True), GATED),
    ("one pod is replaced, and starts if it can", lambda it: (it.replace(), it.start()), None),
    ("the other too, and both are ready", lambda it: (it.replace(), it.start()), None),
    ("version: v2, without a digest, while the registry is down", lambda it: it.change(version="v2", digest=None), None),
    ("the controller hands out its earlier answer", lambda it: it.preload("Ready", earlier=True), GATED),
    ("both pods are replaced, and ready", lambda it: (it.replace(), it.start(), it.replace(), it.start()), None),
    ("version: v3, which it never had, while the registry is down", lambda it: it.change(version="v3"), GATED),
    ("the registry cannot be asked", lambda it: it.preload("RegistryUnavailable"), GATED),
    ("version: v2", lambda it: it.change(version="v2"), GATED),
    ("the registry is back", lambda it: it.preload("Ready"), GATED),
    ("replicas: 0", lambda it: it.change(replicas=0), None),
    ("its pods are gone", Cluster.see, None),
    ("replicas: 5", lambda it: it.change(replicas=5), None),
    ("five pods are there", Cluster.see, None),
    ("they are ready", Cluster.start, None),
    ("scrapeConfig with a mistake", lambda it: it.change(scrapeConfig=SCRAPES[2]), GATED),
    ("promtool refuses it", Cluster.check, GATED),
    ("Prometheus does not load it either", Cluster.check, GATED),
    ("the mistake is mended", lambda it: it.change(scrapeConfig=SCRAPES[0]), GATED),
    ("promtool accepts it", Cluster.check, GATED),
    ("the ArtifactPreload is deleted by hand", lambda it: it.delete("artifact"), GATED),
    ("the controller has looked at the new one", lambda it: it.preload("Ready"), GATED),
    ("the StatefulSet is deleted by hand", lambda it: it.delete("statefulset"), None),
    ("five pods are there and ready", lambda it: (it.see(), it.start()), None),
]


def short(reference, cluster):
    """A reference without its repository, and a digest without most of its digits."""
    text = reference.replace(cluster.repository + ":", "")
    return text[: text.index("@sha256:") + 12] + "..." if "@" in text else text


def rows(composition):
    """What the story looks like: (step, SYNCED, READY, RUNNING, ARTIFACT, CONFIG) for each of its steps."""
    cluster = Cluster(composition)
    for step, act, only in STEPS:
        if only not in (None, composition):
            continue
        act(cluster)
        cluster.reconcile()
        # Crossplane is called again by what it has changed, until that is nothing.
        cluster.reconcile()
        yield (
            step,
            str(cluster.synced),
            str(cluster.ready),
            short(cluster.running, cluster),
            cluster.artifact,
            cluster.xr["status"].get("config", ""),
        )
    # Kubernetes deletes what is composed with the object.
    yield ("kubectl delete: it is gone, with all that is composed", "", "", "", "", "")


def runs_what_is_wanted(cluster):
    """Whether READY should be True of what was there when Crossplane looked, found out without any status."""
    replicas = cluster.xr["spec"]["replicas"]
    wanted = cluster.wanted
    memory = cluster.xr["spec"].get("resources", {}).get("memory", "2Gi")
    pods = [
        reference.partition("@")[0]
        for reference, revision, ready in cluster.pods
        if ready and f'"memory": "{memory}"' in revision
    ]
    if len(cluster.pods) != replicas or pods != [wanted] * replicas:
        return False
    if "statefulset" not in cluster.objects:
        return False
    return cluster.composition == PLAIN or (cluster.configured and cluster.preloaded == wanted)


def walk(composition, seed, steps):
    """Things happen in any order; READY is never True but when what is wanted runs, and becomes so when all settles."""
    chance = random.Random(seed)
    cluster = Cluster(composition)
    cluster.promtool = seed % 2 == 0
    cluster.settle()
    happened = []

    def change(field, values):
        cluster.change(**{field: chance.choice([each for each in values if each != cluster.xr["spec"].get(field)])})

    events = {
        "version": lambda: change("version", ["v1", "v2", "v4"]),
        "replicas": lambda: change("replicas", [0, 1, 2, 5]),
        "memory": lambda: change("resources", [{"memory": "1Gi"}, {"memory": "3Gi"}]),
        "scrape": lambda: change("scrapeConfig", SCRAPES),
        "preload": cluster.look,
        "check": cluster.check,
        "see": cluster.see,
        "replace": cluster.replace,
        "start": cluster.start,
        "lost": lambda: cluster.delete(chance.choice(["artifact", "statefulset", "role"])),
    }
    names = list(events)
    weights = [4, 2, 2, 2, 3, 2, 3, 3, 3, 1]
    for _ in range(steps):
        (event,) = chance.choices(names, weights)
        events[event]()
        happened.append(event)
        # What Crossplane has applied brings it back before others have looked.
        for _ in range(2 if event in ("version", "replicas", "memory", "scrape") else 1):
            expected = runs_what_is_wanted(cluster)
            ran = any(ready for _, _, ready in cluster.pods)
            # What runs already is not given a wrong configuration.
            guarded = "statefulset" in cluster.objects and WRONG not in str(cluster.objects["config"])
            guarded = guarded and composition == GATED
            cluster.reconcile()
            where = f"{composition}, seed {seed}, after {', '.join(happened)}"
            if guarded and WRONG in str(cluster.objects["config"]):
                yield f"{where}: the pods got a wrong configuration"
                return
            if cluster.ready and not expected:
                yield f"{where}: READY, and {cluster.wanted} does not run"
                return
            if cluster.running and not ran:
                yield f"{where}: RUNNING is {cluster.running}, and no pod is ready"
                return
    cluster.settle()
    exists = cluster.xr["spec"]["version"] in PUSHED
    wrong = composition == GATED and not cluster.configured
    if wrong and "Refused: " not in cluster.xr["status"]["config"]:
        yield f"{composition}, seed {seed}: settled, and the status says {cluster.xr['status']}"
    nothing = composition == PLAIN and not cluster.xr["spec"]["replicas"]
    if cluster.ready != ((exists or nothing) and not wrong):
        yield f"{composition}, seed {seed}, after {', '.join(happened)}: settled, and READY is {cluster.ready}: {cluster.conditions}"
    if exists and cluster.pods and cluster.running.partition("@")[0] != cluster.wanted:
        yield f"{composition}, seed {seed}: settled, and RUNNING is {cluster.running}"


def table(composition):
    """The story as it stands in docs/how-to/prometheus-by-crossplane.md."""
    head = ("step", "SYNCED", "READY", "RUNNING", "ARTIFACT", "CONFIG")
    if composition == PLAIN:
        head = head[:-1]
    told = [row[: len(head)] for row in rows(composition)]
    lines = [head, ("---",) * len(head), *told]
    return "\n".join("| " + " | ".join(cell for cell in line) + " |" for line in lines) + "\n"


HOW_TO = chart.ROOT / "docs/how-to/prometheus-by-crossplane.md"
WALKS = 3
STEPS_OF_A_WALK = 20


def crossplane_ready():
    """The object becomes READY when what is wanted runs, and only then, whatever happens before and in which order."""
    yield from never_ready()
    for composition in COMPOSITIONS:
        for seed in range(WALKS):
            yield from walk(composition, seed, STEPS_OF_A_WALK)


def crossplane_story():
    """What kubectl shows in each step of an object's life is what the documentation says."""
    text = HOW_TO.read_text()
    for composition in COMPOSITIONS:
        if table(composition) not in text:
            yield f"{HOW_TO.name} lacks the table of {composition}:\n{table(composition)}"


if __name__ == "__main__":
    # For the page, after a change.
    for each in COMPOSITIONS:
        print(f"{each}\n\n{table(each)}")
