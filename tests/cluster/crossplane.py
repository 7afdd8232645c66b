"""Checks of deploy/crossplane."""

import copy

import jsonschema
import yaml

import chart
import compose
import render

PLAIN = "customprometheus"
GATED = "customprometheus-gated"
PRELOADED = "customprometheus-preloaded"
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
    ({"repository": "registry.example.com/a"}, "repository"),
]


def changed(**fields):
    xr = render.example()
    xr["spec"] |= fields
    return xr


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
    minimal = render.example()
    minimal["spec"] = {
        "ociRegistry": "registry.example.com:5000/a",
        "version": "v1",
        "scrapeConfig": "[]",
    }
    stored = compose.admit(minimal)["spec"]
    if (stored["replicas"], stored["storage"]) != (1, {"capacity": "50Gi"}):
        yield f"defaults are missing: {stored}"
    for name in (PLAIN, GATED, PRELOADED):
        compose.compose(name, minimal)
    definition = compose.XRD["spec"]
    if compose.XRD["metadata"]["name"] != f"{definition['names']['plural']}.{definition['group']}":
        yield "the definition's name is not <plural>.<group>"
    if definition["defaultCompositionRef"]["name"] != PLAIN:
        yield "the default Composition is another one"
    # Defaults must be valid themselves, or the API server refuses the definition.
    jsonschema.Draft202012Validator.check_schema(
        compose.closed(definition["versions"][0]["schema"]["openAPIV3Schema"])
    )


def crossplane_compositions():
    """Both Compositions make the same of an object, and their parts fit together."""
    pinned = changed(digest=DIGEST, nodeSelector={"disk": "ssd"}, replicas=3)
    for xr in (render.example(), pinned):
        at_once, _ = compose.compose(PLAIN, xr)
        held, _ = compose.compose(GATED, xr)
        warm = {"warm": compose.rolled_out(held["warm"], nodes=2)}
        gated, _ = compose.compose(GATED, xr, warm)
        for name, wanted in at_once.items():
            if gated.get(name) != wanted:
                yield f"the Compositions differ in {name}:\n{wanted}\n{gated.get(name)}"
        yield from parts(at_once, xr)
        if held["warm"]["spec"]["template"]["spec"]["nodeSelector"] != xr["spec"].get(
            "nodeSelector", {}
        ):
            yield "the artifact is brought onto other nodes than Prometheus runs on"
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
    for selector in selectors:
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


def crossplane_gate():
    """The gated Composition rolls only to what is on every node, and keeps what runs until then."""

    def compose_with(xr, warm=None, running=None):
        observed = {"warm": warm} if warm else {}
        if running:
            observed["statefulset"] = running
        desired, status = compose.compose(GATED, xr, observed)
        used = desired.get("statefulset")
        return desired["warm"], used, used and attributes(used)["tag"], status.get("reference")

    first, second = changed(version="v1"), changed(version="v2")
    warm, used, _, _ = compose_with(first)
    if used:
        yield "a Prometheus is started before its artifact is anywhere"
    ready = compose.rolled_out(warm, nodes=2)
    _, running, version, _ = compose_with(first, ready)
    if version != "v1":
        yield f"the first version is not rolled out: {version}"
    wanted, _, version, reference = compose_with(second, ready, running)
    if version != "v1" or not reference.endswith(":v1"):
        yield f"rolled to {version} ({reference}) while the nodes have the first version only"
    if attributes_of_warm(wanted)["tag"] != "v2":
        yield "the second version is not brought onto the nodes"
    for field, value in {
        "observedGeneration": 0,
        "updatedNumberScheduled": 1,
        "numberAvailable": 1,
        "desiredNumberScheduled": 3,
    }.items():
        partly = compose.rolled_out(wanted, nodes=2)
        partly["status"][field] = value
        _, _, version, _ = compose_with(second, partly, running)
        if version != "v1":
            yield f"rolled while {field} is {value}"
    nowhere = compose.rolled_out(wanted, nodes=0)
    if compose_with(second, nowhere, running)[2] != "v1":
        yield "rolled with no node that has it"
    if compose_with(second, None, running)[2] != "v1":
        yield "what runs is lost with the DaemonSet"
    if compose_with(second, compose.rolled_out(wanted, nodes=2), running)[2] != "v2":
        yield "not rolled though every node has it"
    # The way back, whose content the nodes have already, takes the same gate.
    again = copy.deepcopy(compose.rolled_out(warm, nodes=2))
    _, newer, _, _ = compose_with(second, compose.rolled_out(wanted, nodes=2), running)
    if compose_with(first, again, newer)[2] != "v1":
        yield "not rolled back"
    # The status tells what runs, also with a digest.
    pinned = changed(version="v1", digest=DIGEST)
    for name in (PLAIN, GATED):
        desired, _ = compose.compose(PLAIN, pinned)
        _, status = compose.compose(name, second, {"statefulset": desired["statefulset"]})
        if not status["reference"].endswith(f":v1@{DIGEST}"):
            yield f"{name}: the status has {status['reference']}"


def crossplane_preload():
    """The Composition with a preload rolls to what is ready, whatever is wanted, and never loses what runs."""

    def compose_with(xr, ready=None, running=None):
        observed = {"artifact": {"status": {"readyReference": ready}}} if ready else {}
        if running:
            observed["statefulset"] = running
        desired, status = compose.compose(PRELOADED, xr, observed)
        used = desired.get("statefulset")
        return desired["artifact"]["spec"], used, used and attributes(used)["reference"], status

    first, second = changed(version="v1"), changed(version="v2", nodeSelector={"disk": "ssd"})
    name = first["spec"]["ociRegistry"]
    one, two = (f"{name}:{version}@{DIGEST}" for version in ("v1", "v2"))
    wanted, used, _, _ = compose_with(first)
    if used or wanted["reference"] != f"{name}:v1":
        yield f"something is started before its artifact is anywhere, or {wanted} is wanted"
    _, running, reference, _ = compose_with(first, one)
    if reference != one:
        yield f"the first version is not rolled out: {reference}"
    wanted, _, reference, status = compose_with(second, one, running)
    if reference != one or status["reference"] != one:
        yield f"rolled to {reference} before it is ready"
    if wanted["reference"] != f"{name}:v2" or wanted["selector"] != {"matchLabels": {"disk": "ssd"}}:
        yield f"{wanted} is brought onto the nodes"
    if wanted["pullSecrets"] != [first["spec"]["imagePullSecret"]]:
        yield f"the preload has the secrets {wanted['pullSecrets']}"
    if compose_with(second, None, running)[2] != one:
        yield "what runs is lost with the preload"
    if compose_with(second, two, running)[2] != two:
        yield "not rolled though every node has it"
    pinned, _, _, _ = compose_with(changed(version="v1", digest=DIGEST))
    if pinned["reference"] != one:
        yield f"the digest is lost: {pinned['reference']}"
    # All but the artifact is as in the Composition that rolls at once.
    at_once, _ = compose.compose(PLAIN, first)
    preloaded, _ = compose.compose(
        PRELOADED, first, {"artifact": {"status": {"readyReference": one}}}
    )
    for part, expected in at_once.items():
        found = copy.deepcopy(preloaded.get(part))
        if part == "statefulset":
            volume = found["spec"]["template"]["spec"]["volumes"][0]["csi"]
            volume["volumeAttributes"] = attributes(expected)
        if found != expected:
            yield f"the Compositions differ in {part}:\n{expected}\n{found}"


def attributes_of_warm(daemonset):
    return daemonset["spec"]["template"]["spec"]["volumes"][0]["csi"]["volumeAttributes"]


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
    for name in (PLAIN, GATED, PRELOADED):
        for step in compose.composition(name)["spec"]["pipeline"]:
            if step["functionRef"]["name"] not in functions:
                yield f"{name} needs {step['functionRef']['name']}, which functions.yaml lacks"


CHECKS = (
    crossplane_schema,
    crossplane_compositions,
    crossplane_gate,
    crossplane_preload,
    crossplane_rights,
)
