"""Checks of deploy/crossplane."""

import copy
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import celpy
import jsonschema
import yaml

import chart
import compose
import fleet
import render

PLAIN = "customprometheus"
GATED = "customprometheus-gated"
DIGEST = "sha256:" + "ab" * 32

# What the API server must refuse: changes of the example's specification, and a part of the message.
WRONG = [
    ({"version": "not a tag"}, "spec.version"),
    ({"version": ""}, "spec.version"),
    ({"version": "-v1"}, "spec.version"),
    ({"version": None}, "spec.version"),
    ({"digest": "sha256:12"}, "spec.digest"),
    ({"digest": "md5:" + "0" * 32}, "spec.digest"),
    ({"digest": DIGEST.upper()}, "spec.digest"),
    ({"ociRegistry": "https://registry.example.com/a"}, "spec.ociRegistry"),
    ({"ociRegistry": "registry.example.com/a:v1"}, "spec.ociRegistry"),
    ({"ociRegistry": "registry.example.com"}, "spec.ociRegistry"),
    ({"storage": {"capacity": "lots"}}, "spec.storage.capacity"),
    ({"storage": {"capacity": "0Gi"}}, "spec.storage.capacity"),
    ({"storage": {"capacity": "100GiB"}}, "spec.storage.capacity"),
    ({"retention": {"time": "two weeks"}}, "spec.retention.time"),
    ({"retention": {"size": "10GiB"}}, "spec.retention.size"),
    ({"resources": {"memory": "0"}}, "spec.resources.memory"),
    ({"replicas": -1}, "spec.replicas"),
    ({"replicas": "2"}, "spec.replicas"),
    ({"pullPolicy": "Sometimes"}, "spec.pullPolicy"),
    ({"scrapeConfig": ""}, "spec.scrapeConfig"),
    ({"scrapeConfig": "- job_name: a\u0085b"}, "spec.scrapeConfig"),
    ({"externalLabels": {"a": "b\x7f"}}, "spec.externalLabels"),
    ({"repository": "registry.example.com/a"}, "repository"),
    ({"imagePullSecret": ""}, "spec.imagePullSecret"),
    ({"imagePullSecret": "a, b"}, "spec.imagePullSecret"),
    ({"imagePullSecret": "a]\n  paused: true\n  platforms: ["}, "spec.imagePullSecret"),
    ({"storage": {"storageClassName": "fast\n  hostPath: {}"}}, "spec.storage.storageClassName"),
    ({"toleratedNodes": -1}, "spec.toleratedNodes"),
    ({"toleratedNodes": "half"}, "spec.toleratedNodes"),
    ({"toleratedNodes": "101%"}, "spec.toleratedNodes"),
]

# Names of objects, and whether the definition takes them: Services have them too.
NAMES = [
    ("billing", True),
    ("a", True),
    ("a" * 50, True),
    ("a" * 51, False),
    ("null", True),
    ("1billing", False),
    ("billing.team", False),
    ("billing-", False),
]


def changed(**fields):
    xr = render.example()
    xr["spec"] |= fields
    return xr


def minimal(**fields):
    """The least that is accepted."""
    xr = render.example()
    repository = "registry.example.com:5000/a"
    xr["spec"] = {"ociRegistry": repository, "version": "v1", "scrapeConfig": "[]"} | fields
    return xr


# What YAML takes for something else than text, and what would end a text that is not quoted.
NOT_TEXTS = ["null", "true", "yes", "on", "no", "off", "1e3", "0x1f", "123", "1.5"]
HARD_TEXT = "a: b #c\n---\n- 'x': \"y\" \\ \t{{ .z }} %s %d ${A} <&>\u2028\U0001f600"


def odd_objects():
    """Accepted objects whose fields are at the edges of what is accepted."""
    for text in NOT_TEXTS:
        xr = minimal(imagePullSecret=text, storage={"storageClassName": text}, version=text)
        xr["spec"] |= {"nodeSelector": {text: text}, "externalLabels": {"label": text}}
        xr["metadata"] |= {"name": text if text[0].isalpha() else "a", "namespace": text.replace(".", "")}
        yield xr
    hard = minimal(externalLabels={"label": HARD_TEXT}, nodeSelector={"a.b/c": "", "d": "a" * 63})
    hard["spec"]["scrapeConfig"] = yaml.safe_dump([{"job_name": HARD_TEXT}]) + "# {{ .a }} %s \t "
    hard["metadata"] |= {"name": "a" * 50, "namespace": "b" * 63}
    yield hard
    yield minimal(replicas=0, toleratedNodes=0, retention={"time": "1y2w3d4h5m6s7ms", "size": "512MB"})
    yield minimal(replicas=20, toleratedNodes=10000, resources={"cpu": "0.5", "memory": "1.5Gi"})
    yield minimal(toleratedNodes="0%", digest=DIGEST, version="v" * 128, storage={"capacity": "1.5Ti"})
    yield minimal(toleratedNodes="100%", pullPolicy="Always", scrapeConfig="- job_name: a\r\n- job_name: b")


def attributes(statefulset):
    return statefulset["spec"]["template"]["spec"]["volumes"][0]["csi"]["volumeAttributes"]


def crossplane_schema():
    """Wrong objects are refused with a message that names the field, and right ones get their defaults."""
    for fields, message in WRONG:
        try:
            compose.admit(changed(**fields))
        except compose.Rejected as rejection:
            if message not in str(rejection):
                yield f"{fields} is refused, but not for {message}: {rejection}"
        else:
            yield f"{fields} is accepted"
    stored = compose.admit(minimal())["spec"]
    if (stored["replicas"], stored["storage"]) != (1, {"capacity": "50Gi"}):
        yield f"defaults are missing: {stored}"
    definition = compose.XRD["spec"]
    rules = definition["versions"][0]["schema"]["openAPIV3Schema"]["x-kubernetes-validations"]
    for name, allowed in NAMES:
        taken = all(fleet.evaluate(rule["rule"], self={"metadata": {"name": name}}) for rule in rules)
        if taken != allowed:
            yield f"the name {name} is {'refused' if allowed else 'accepted'}"
    if compose.XRD["metadata"]["name"] != f"{definition['names']['plural']}.{definition['group']}":
        yield "the definition's name is not <plural>.<group>"
    if definition["defaultCompositionRef"]["name"] != PLAIN:
        yield "the default Composition is another one"
    # Defaults must be valid themselves, or the API server refuses the definition.
    jsonschema.Draft202012Validator.check_schema(
        compose.closed(definition["versions"][0]["schema"]["openAPIV3Schema"])
    )


# What an observed object is like, what a function before has said, and whether function-auto-ready counts it as ready.
# As its version 0.6.3 did on a cluster.
CONDITION = {"type": "Ready", "status": "True", "observedGeneration": 1}
ROLE = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {}}
SET = {"apiVersion": "apps/v1", "kind": "StatefulSet", "spec": {"replicas": 1}}
ALL_RUN = {"readyReplicas": 1, "currentReplicas": 1, "currentRevision": "a", "updateRevision": "a"}
READINESS = [
    (ROLE, None, None),
    (ROLE, True, True),
    (ROLE | {"status": {"conditions": [CONDITION]}}, None, True),
    # It is about an earlier generation, which nobody compares.
    ({"apiVersion": "oci.custom.io/v1alpha1", "kind": "ArtifactPreload", "metadata": {"generation": 2}, "status": {"conditions": [CONDITION]}}, None, True),
    ({"apiVersion": "v1", "kind": "ConfigMap"}, None, True),
    ({"apiVersion": "v1", "kind": "ConfigMap"}, False, False),
    ({"apiVersion": "v1", "kind": "Service", "spec": {}}, None, True),
    ({"apiVersion": "v1", "kind": "Service", "spec": {"type": "LoadBalancer"}}, None, None),
    (SET, None, None),
    (SET | {"status": ALL_RUN}, None, True),
    (SET | {"status": ALL_RUN | {"updateRevision": "b"}}, None, None),
    (SET | {"spec": {"replicas": 0}, "status": {"currentRevision": "a", "updateRevision": "a"}}, None, None),
]
# Checks of patch and transform, an observed object, and whether it is ready by them.
CHECKED = [
    ([], ROLE, None),
    ([], ROLE | {"status": {"conditions": [CONDITION]}}, True),
    ([{"type": "None"}], ROLE, True),
    ([{"type": "None"}], None, None),
    ([{"type": "NonEmpty", "fieldPath": "status.at"}], ROLE, None),
    ([{"type": "MatchString", "fieldPath": "kind", "matchString": "Role"}], ROLE, True),
    ([{"type": "None"}, {"type": "MatchString", "fieldPath": "kind", "matchString": "Job"}], ROLE, None),
]


def crossplane_functions():
    """The evaluator counts as ready what the real functions and Crossplane did."""
    for observed, said, expected in READINESS:
        state = compose.State(desired={"it": {}}, ready={"it": said})
        compose.auto_ready(None, {}, {"it": observed}, state)
        if state.ready["it"] is not expected:
            yield f"function-auto-ready: {observed} after {said}: {state.ready['it']}"
    state = compose.State(desired={"it": {}}, ready={"it": None})
    compose.auto_ready(None, {}, {}, state)
    if state.ready["it"] is not None:
        yield "function-auto-ready: what does not exist is ready"
    for checks, observed, expected in CHECKED:
        observed = observed and observed | {"metadata": {"name": "it", "namespace": "team"}}
        resource = {"name": "it", "base": {}, "patches": [], "readinessChecks": checks}
        state = compose.State()
        step = {"patchSets": [], "resources": [resource]}
        compose.patch_and_transform(step, {}, {"it": observed} if observed else {}, state)
        if state.ready["it"] is not expected:
            yield f"patch and transform: {checks}, {observed}: {state.ready['it']}"
    if compose.names_of(["eel", "cow", "cat", "dog"]) != "cat, cow, dog, and 1 more":
        yield "Crossplane names others than these"


def crossplane_compositions():
    """Both Compositions make the same of an object but for how they name the artifact, and their parts fit together."""
    pinned = changed(digest=DIGEST, nodeSelector={"disk": "ssd"}, replicas=3, toleratedNodes="10%")
    for xr in (render.example(), pinned, *odd_objects()):
        at_once, _ = compose.compose(PLAIN, xr)
        held, _ = compose.compose(GATED, xr)
        gated, _ = compose.compose(GATED, xr, {"artifact": compose.preloaded(held["artifact"], DIGEST)})
        for name, wanted in at_once.items():
            found = copy.deepcopy(gated.get(name))
            if name == "statefulset" and found:
                wanted = copy.deepcopy(wanted)
                by_tag, by_digest = attributes(wanted), attributes(found)
                if by_tag.pop("pullPolicy") != by_digest.pop("pullPolicy"):
                    yield "the Compositions differ in the pull policy"
                by_tag.clear(), by_digest.clear()
                # The digest of its specification, which is another one by that.
                wanted["metadata"].pop("annotations"), found["metadata"].pop("annotations")
            if found != wanted:
                yield f"the Compositions differ in {name}:\n{wanted}\n{found}"
        yield from parts(at_once, xr)
        # Also where addresses are of IPv6.
        address = "http://{name}.{namespace}.svc:9090".format(**xr["metadata"])
        service = at_once["service"] | {"spec": {"clusterIP": "fd00::7"}}
        for name in (PLAIN, GATED):
            _, status = compose.compose(name, xr, {"service": service})
            if status.get("address") != address:
                yield f"{name}: the address is {status.get('address')}, not {address}"
        if held["artifact"]["spec"]["selector"]["matchLabels"] != xr["spec"].get("nodeSelector", {}):
            yield "the artifact is brought onto other nodes than Prometheus runs on"
        tolerated = xr["spec"].get("toleratedNodes", 1)
        if held["artifact"]["spec"]["toleratedNodes"] != tolerated:
            yield f"{tolerated} nodes may stay away, but not for the artifact"
        secret = xr["spec"].get("imagePullSecret")
        if held["artifact"]["spec"].get("pullSecrets") != (secret and [secret]):
            yield f"the artifact is fetched with other secrets than {secret}: {held['artifact']['spec']}"
        if held["artifact"]["metadata"]["name"] != xr["metadata"]["name"]:
            yield f"the preload of {xr['metadata']['name']} is named {held['artifact']['metadata']['name']}"
    first, second = (compose.composition(name)["spec"]["pipeline"][1:] for name in (PLAIN, GATED))
    if first != second:
        yield "the Compositions differ in how they find out what is ready"
    digest = attributes(compose.compose(PLAIN, pinned)[0]["statefulset"]).get("digest")
    if digest != DIGEST:
        yield f"the digest of the volume is {digest}"
    if "digest" in attributes(compose.compose(PLAIN, render.example())[0]["statefulset"]):
        yield "a digest that nobody asked for"


def parts(composed, xr):
    statefulset = composed["statefulset"]["spec"]
    pod = statefulset["template"]["spec"]
    labels = statefulset["template"]["metadata"]["labels"]
    selectors = [statefulset["selector"]["matchLabels"]] + [
        composed[service]["spec"]["selector"] for service in ("service", "service-headless")
    ]
    # Replicas keep away from each other, on nodes and in zones.
    (term,) = pod["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    (spread,) = pod["topologySpreadConstraints"]
    apart = [term["podAffinityTerm"], spread]
    if [each["topologyKey"] for each in apart] != ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]:
        yield f"replicas keep away from each other by {apart}"
    selectors += [each["labelSelector"]["matchLabels"] for each in apart]
    for selector in selectors:
        if len(selector) != 2:
            yield f"{selector} selects pods of other objects"
        if not selector.items() <= labels.items():
            yield f"{selector} does not select {labels}"
    if statefulset["serviceName"] != composed["service-headless"]["metadata"]["name"]:
        yield "the StatefulSet names another headless service"
    if pod["serviceAccountName"] != composed["service-account"]["metadata"]["name"]:
        yield "the pod has another service account"
    if composed["role-binding"]["roleRef"]["name"] != composed["role"]["metadata"]["name"]:
        yield "the binding binds another role"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    if volumes["config"]["configMap"]["name"] != composed["config"]["metadata"]["name"]:
        yield "the pod mounts another configuration"
    if volumes["artifact"]["csi"].get("readOnly") is not True:
        yield "the artifact's volume is not read-only"
    names = set(volumes) | {
        claim["metadata"]["name"] for claim in statefulset["volumeClaimTemplates"]
    }
    for container in pod["containers"]:
        for mount in container["volumeMounts"]:
            if mount["name"] not in names:
                yield f"no volume {mount['name']}"
    scrape = yaml.safe_load(composed["config"]["data"]["user-scrape.yml"])
    if scrape["scrape_configs"] != yaml.safe_load(xr["spec"]["scrapeConfig"]):
        yield f"the user's jobs became {scrape}"
    if any(resource["metadata"]["namespace"] != xr["metadata"]["namespace"] for resource in composed.values()):
        yield "something is made in another namespace"


def started(statefulset):
    """The StatefulSet with all of its pods ready."""
    statefulset = copy.deepcopy(statefulset)
    statefulset["metadata"]["generation"] = 1
    replicas = statefulset["spec"]["replicas"]
    counted = ("replicas", "readyReplicas", "updatedReplicas", "currentReplicas")
    statefulset["status"] = {"observedGeneration": 1} | {field: replicas for field in counted}
    return statefulset


def promtool(*arguments):
    tools = pathlib.Path(sys.executable).parents[2] / "bin"
    program = shutil.which("promtool", path=f"{tools}:{os.environ['PATH']}")
    return subprocess.run([program, *arguments], capture_output=True, text=True)


# Labels of an object, and whether the definition takes them.
LABELS = [
    ({}, True),
    ({"cluster": "west", "_team": "billing"}, True),
    ({"replica": "a"}, False),
    ({"prometheus": "a"}, False),
]


# Lists of jobs, however they are written.
SCRAPES = [
    render.example()["spec"]["scrapeConfig"],
    "[]",
    '[{"job_name": "a"},\n{"job_name": "b"}]',
    "- job_name: a",
    "# Ours.\n\n  - job_name: a\r\n  - job_name: b\r\n",
    "- job_name: >-\n    a\n\n    b\n- job_name: c\n\n\n",
]


def crossplane_configuration():
    """Prometheus takes what is composed, and every replica has labels of its own."""
    labels = {"cluster": "west", "note": HARD_TEXT}
    for name, scrape in itertools.product((PLAIN, GATED), SCRAPES):
        desired, _ = compose.compose(name, changed(externalLabels=labels, scrapeConfig=scrape))
        with tempfile.TemporaryDirectory() as folder:
            for file, text in desired["config"]["data"].items():
                path = pathlib.Path(folder) / file
                path.write_text(text.replace("/etc/prometheus", folder))
            checked = promtool("check", "config", f"{folder}/prometheus.yml")
        if checked.returncode:
            yield f"{name}: {scrape!r}: promtool: {checked.stdout}{checked.stderr}"
        found = yaml.safe_load(desired["config"]["data"]["prometheus.yml"])
        found = found["global"]["external_labels"]
        if found != labels | {"prometheus": "${NAMESPACE}/${NAME}", "replica": "${POD_NAME}"}:
            yield f"{name}: the external labels are {found}"
        desired, _ = compose.compose(PLAIN, changed())
        container = desired["statefulset"]["spec"]["template"]["spec"]["containers"][0]
        variables = {each["name"]: each for each in container["env"]}
        if variables["NAME"]["value"] != changed()["metadata"]["name"] or len(variables) != 3:
            yield f"{name}: the variables are {variables}"
    spec = compose.XRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    (rule,) = spec["properties"]["externalLabels"]["x-kubernetes-validations"]
    for labels, allowed in LABELS:
        if fleet.evaluate(rule["rule"], self=labels) != allowed:
            yield f"external labels {labels} are {'refused' if allowed else 'accepted'}"


def crossplane_check():
    """The jobs that check a configuration are valid, may be made, and nothing that serves selects their pods."""
    import check
    import story

    cluster = story.Cluster(GATED)
    cluster.settle()
    cluster.promtool = False
    cluster.change(scrapeConfig=story.SCRAPES[0])
    cluster.reconcile()
    cluster.check()
    cluster.reconcile()
    jobs = [each for each in cluster.objects.values() if each["kind"] == "Job"]
    if len(jobs) != 2:
        yield f"not promtool and then Prometheus itself: {jobs}"
    bare = [{key: each[key] for key in ("apiVersion", "kind", "metadata", "spec")} for each in jobs]
    for version in ("1.30", check.VERSIONS[-1]):
        yield from check.invalid(GATED, copy.deepcopy(bare), version)
    statefulset = cluster.objects["statefulset"]["spec"]
    container = statefulset["template"]["spec"]["containers"][0]
    folder = container["command"][0].rpartition("/")[0]
    for job in jobs:
        if len(job["metadata"]["name"]) > 63:
            yield f"{job['metadata']['name']} is too long for a label of its pods"
        template = job["spec"]["template"]
        if statefulset["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items():
            yield "a pod that checks is one of the StatefulSet"
        (checks,) = template["spec"]["containers"]
        if checks["command"][0].rpartition("/")[0] != folder:
            yield f"{checks['command']} is not of the artifact"
        if story.mounted(job) != story.mounted({"spec": statefulset}):
            yield "another artifact checks than runs"
    rules = yaml.safe_load((compose.FOLDER / "rbac.yaml").read_text())["rules"]
    if not any("jobs" in rule["resources"] and WRITE <= set(rule["verbs"]) for rule in rules):
        yield "Crossplane may not make jobs"


def split(text, separator):
    """Of Kubernetes' library for strings, which the evaluator of CEL lacks."""
    parts = [celpy.celtypes.StringType(part) for part in str(text).split(str(separator))]
    return celpy.celtypes.ListType(parts)


OWN = "- job_name: a\n  kubernetes_sd_configs:\n    - role: pod\n      namespaces: {own_namespace: true}\n"
ALL = "- job_name: b\n  kubernetes_sd_configs: [{role: endpoints}]\n"
# Scrape configurations, and whether whoever applies one is warned.
DISCOVERY = [
    (OWN, False),
    (OWN + OWN, False),
    (ALL, True),
    (OWN + ALL, True),
    ("- job_name: c\n  static_configs: [{targets: [a:1]}]\n", False),
    (render.example()["spec"]["scrapeConfig"], False),
]


def crossplane_warning():
    """Service discovery beyond the own namespace is warned of when it is applied, and nothing is refused."""
    policy, binding = chart.documents((compose.FOLDER / "warning.yaml").read_text())
    if binding["spec"]["validationActions"] != ["Warn"]:
        yield "it does more than to warn"
    environment = celpy.Environment()

    def evaluate(text, **context):
        program = environment.program(environment.compile(text), functions={"split": split})
        context = {name: celpy.json_to_cel(each) for name, each in context.items()}
        return bool(program.evaluate(context))

    (validation,) = policy["spec"]["validations"]
    (condition,) = policy["spec"]["matchConditions"]
    for text, warned in DISCOVERY:
        xr = changed(scrapeConfig=text)
        if evaluate(validation["expression"], object=xr) == warned:
            yield f"{'no warning' if warned else 'a warning'} for {text}"
    other = changed(scrapeConfig=ALL)
    for before, asked in ((None, True), (render.example(), True), (other, False)):
        if evaluate(condition["expression"], object=other, oldObject=before) != asked:
            yield f"the warning after {before} is {'missing' if asked else 'given'}"


def crossplane_gate():
    """The gated Composition rolls only to what is on every node, and keeps what runs until then."""

    def compose_with(xr, artifact=None, running=None):
        observed = {"artifact": artifact, "statefulset": running and started(running)}
        observed = {name: value for name, value in observed.items() if value}
        desired, status = compose.compose(GATED, xr, observed)
        used = desired.get("statefulset")
        return desired["artifact"], used, used and attributes(used).get("reference"), status

    first, second = changed(version="v1"), changed(version="v2")
    name = first["spec"]["ociRegistry"]
    other = "sha256:" + "cd" * 32
    one, two = f"{name}:v1@{DIGEST}", f"{name}:v2@{other}"

    # The first install.
    wanted_first, used, _, status = compose_with(first)
    if used or wanted_first["spec"]["reference"] != f"{name}:v1":
        yield f"a Prometheus is started before its artifact is anywhere, or {wanted_first} is wanted"
    if "controller" not in status["artifact"]:
        yield f"nobody says that there may be no controller: {status['artifact']}"
    for reason in ("Resolving", "Preloading", "NodesFailed", "ReferenceNotFound", "Paused"):
        held = compose.preloaded(wanted_first, DIGEST, reason)
        _, used, _, status = compose_with(first, held)
        if used or not status["artifact"].startswith(f"{reason}: "):
            yield f"started while it is {reason}, or that is not said: {status['artifact']}"
    ready_first = compose.preloaded(wanted_first, DIGEST)
    _, running, reference, _ = compose_with(first, ready_first)
    if reference != one:
        yield f"the first version is not rolled out: {reference}"

    # A new version: the preload still tells of the first one, then that the second is on its way, or cannot be had.
    wanted_second, _, reference, status = compose_with(second, ready_first, running)
    if reference != one or status["reference"] != one:
        yield f"rolled to {reference} ({status['reference']}) while the nodes have the first version only"
    if wanted_second["spec"]["reference"] != f"{name}:v2":
        yield "the second version is not brought onto the nodes"
    for reason in ("Resolving", "Preloading", "NoNodes", "NodesFailed", "ReferenceNotFound", "PolicyDenied"):
        held = compose.preloaded(wanted_second, other, reason, before=one)
        _, _, reference, status = compose_with(second, held, running)
        if reference != one or not status["artifact"].startswith(f"{reason}: "):
            yield f"rolled to {reference} while it is {reason}, or that is not said: {status['artifact']}"
    ready_second = compose.preloaded(wanted_second, other)
    _, newer, reference, _ = compose_with(second, ready_second, running)
    if reference != two:
        yield f"not rolled though every node has it: {reference}"

    # A status of an earlier generation, or of another reference, opens nothing and is not told as if it were about this.
    for field, value in (("observedGeneration", 0), ("reference", f"{name}:v1")):
        stale = copy.deepcopy(ready_second)
        stale["status"][field] = value
        if compose_with(second, stale, running)[2] != one:
            yield f"rolled though the status has the {field} {value}"
    stale = copy.deepcopy(ready_first)
    stale["spec"], stale["metadata"]["generation"] = wanted_second["spec"], 2
    _, _, _, status = compose_with(second, stale, running)
    if "not observed version v2" not in status["artifact"]:
        yield f"what the nodes hold of v1 is told of v2: {status['artifact']}"

    # The way back, also from a version that becomes ready just when nobody wants it any more.
    held = compose.preloaded(wanted_first, DIGEST, "Preloading", before=two)
    for artifact in (ready_second, held):
        if compose_with(first, artifact, running)[2] != one:
            yield "rolled to a version that is not wanted any more"
    if compose_with(first, held, newer)[2] != two:
        yield "rolled back before every node has it"
    if compose_with(first, ready_first, newer)[2] != one:
        yield "not rolled back"

    # What is lost: the preload, its status, or the StatefulSet.
    for artifact in (None, wanted_second):
        if compose_with(second, artifact, running)[2] != one:
            yield "what runs is lost with the preload"
    held = compose.preloaded(wanted_second, other, "NodesFailed", before=one)
    if compose_with(second, held)[2] != one:
        yield "a StatefulSet that was deleted does not come back before the next version is ready"

    # From the Composition that rolls at once: what it runs stays as it is, to the byte, until all nodes have it.
    at_once, _ = compose.compose(PLAIN, changed(version="v1", digest=DIGEST))
    plain = at_once["statefulset"]
    for artifact in (None, compose.preloaded(wanted_first, DIGEST, "Preloading")):
        _, used, _, status = compose_with(first, artifact, plain)
        if used is None or attributes(used) != attributes(plain):
            yield f"what ran before the gate is lost: {used}"
        if status["reference"] != one:
            yield f"the status has {status['reference']}"
    if compose_with(first, ready_first, plain)[2] != one:
        yield "the gate never opens after another Composition"

    # A digest in the object is wanted, and told.
    pinned = changed(version="v1", digest=DIGEST)
    wanted, _, _, _ = compose_with(pinned)
    if wanted["spec"]["reference"] != one:
        yield f"the digest is lost: {wanted['spec']['reference']}"
    if compose_with(pinned, compose.preloaded(wanted, DIGEST))[2] != one:
        yield "not rolled to the digest that every node has"
    if compose_with(changed(version="v1", digest=other), ready_first, running)[2] != one:
        yield "rolled to another digest of the same tag"
    _, status = compose.compose(PLAIN, second, {"statefulset": started(plain)})
    if status["reference"] != one:
        yield f"{PLAIN}: the status has {status['reference']}"


# Crossplane's own ClusterRole.
CROSSPLANES_OWN = {
    ("", "configmaps"),
    ("", "serviceaccounts"),
    ("", "services"),
    ("apps", "deployments"),
}
WRITE = {"get", "list", "watch", "create", "update", "patch", "delete"}


def crossplane_rights():
    """Crossplane may make all that is composed, and holds what the composed Role grants."""
    rules = yaml.safe_load((compose.FOLDER / "rbac.yaml").read_text())["rules"]
    granted = {
        (group, resource): set(rule["verbs"])
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    for objects in render.composed().values():
        for document in objects:
            group = document["apiVersion"].rpartition("/")[0]
            resource = document["kind"].lower() + "s"
            if (group, resource) in CROSSPLANES_OWN:
                continue
            if not WRITE <= granted.get((group, resource), set()):
                yield f"Crossplane may not make {resource} of {group}"
            for rule in document.get("rules", []):
                for key in ((g, r) for g in rule["apiGroups"] for r in rule["resources"]):
                    if not set(rule["verbs"]) <= granted.get(key, set()):
                        yield f"Crossplane does not hold {rule['verbs']} of {key}, which its Role grants"
    functions = {
        document["metadata"]["name"]
        for document in chart.documents((compose.FOLDER / "functions.yaml").read_text())
    }
    for name in (PLAIN, GATED):
        for step in compose.composition(name)["spec"]["pipeline"]:
            if step["functionRef"]["name"] not in functions:
                yield f"{name} needs {step['functionRef']['name']}, which functions.yaml lacks"


CHECKS = (
    crossplane_functions,
    crossplane_schema,
    crossplane_compositions,
    crossplane_configuration,
    crossplane_check,
    crossplane_warning,
    crossplane_gate,
    crossplane_rights,
)
