"""The policy that bounds which PersistentVolumes the controller may write, and the rights of its account."""

import copy

import celpy

import chart
import startup_taint

ACCOUNT = "system:serviceaccount:csi-driver-oci:csi-driver-oci-fleet"
POLICY = "csi-driver-oci-provisioner"
FINALIZER = "external-provisioner.volume.kubernetes.io/finalizer"
UID = "5e8f0000-0000-4000-8000-000000000001"
VOLUME = {
    "apiVersion": "v1",
    "kind": "PersistentVolume",
    "metadata": {
        "name": f"pvc-{UID}",
        "annotations": {"pv.kubernetes.io/provisioned-by": "oci.custom.io"},
        "labels": {"team": "a"},
        "finalizers": [FINALIZER, "kubernetes.io/pv-protection"],
    },
    "spec": {
        "accessModes": ["ReadOnlyMany"],
        "capacity": {"storage": "1Gi"},
        "claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": "team", "name": "a", "uid": UID},
        "csi": {
            "driver": "oci.custom.io",
            "readOnly": True,
            "volumeHandle": f"pvc-{UID}",
            "volumeAttributes": {"reference": "registry.example.com/team/tool:v1"},
        },
        "persistentVolumeReclaimPolicy": "Delete",
        "storageClassName": "artifacts",
        "volumeMode": "Filesystem",
    },
}


def changed(change):
    """The volume after a change of a copy of it."""
    volume = copy.deepcopy(VOLUME)
    change(volume)
    return volume


def host_path(volume):
    del volume["spec"]["csi"]
    volume["spec"]["hostPath"] = {"path": "/"}


def annotate(value):
    return lambda volume: volume["metadata"].update(annotations=value)


DRIVER = "of the driver and provisioner oci.custom.io only"
CLAIM = "only for the claim that its name is made of"
SPEC = "nothing in the spec"
METADATA = "nothing in the metadata"
# A volume that is not the provisioner's -> a part of the refusal of its creation and deletion.
FOREIGN = [
    ("a hostPath", host_path, DRIVER),
    ("another driver", lambda volume: volume["spec"]["csi"].update(driver="ebs.csi.aws.com"), DRIVER),
    ("no annotations", lambda volume: volume["metadata"].pop("annotations"), DRIVER),
    ("no provisioner", annotate({"a": "b"}), DRIVER),
    ("another provisioner", annotate({"pv.kubernetes.io/provisioned-by": "other"}), DRIVER),
]
# A volume that the provisioner does not create.
CREATED = [
    *FOREIGN,
    ("its own volume", lambda volume: None, None),
    ("no claim", lambda volume: volume["spec"].pop("claimRef"), CLAIM),
    ("a claim without a uid", lambda volume: volume["spec"]["claimRef"].pop("uid"), CLAIM),
    ("another name", lambda volume: volume["metadata"].update(name="pvc-other"), CLAIM),
]
# What is done to an own volume -> a part of the refusal, or nothing where it is allowed.
CHANGES = [
    ("the finalizer is removed", lambda volume: volume["metadata"]["finalizers"].remove(FINALIZER), None),
    ("another finalizer is removed", lambda volume: volume["metadata"]["finalizers"].pop(), METADATA),
    ("a finalizer is added", lambda volume: volume["metadata"]["finalizers"].append("a.com/b"), METADATA),
    ("it becomes a hostPath", host_path, DRIVER),
    ("it changes hands", annotate({"pv.kubernetes.io/provisioned-by": "other"}), DRIVER),
    (
        "another artifact",
        lambda volume: volume["spec"]["csi"]["volumeAttributes"].update(reference="evil.org/tool:v1"),
        SPEC,
    ),
    (
        "another secret",
        lambda volume: volume["spec"]["csi"].update(nodePublishSecretRef={"name": "a", "namespace": "b"}),
        SPEC,
    ),
    ("another claim", lambda volume: volume["spec"]["claimRef"].update(uid="other"), SPEC),
    ("another size", lambda volume: volume["spec"].update(capacity={"storage": "2Gi"}), SPEC),
    ("retained", lambda volume: volume["spec"].update(persistentVolumeReclaimPolicy="Retain"), SPEC),
    ("a label", lambda volume: volume["metadata"]["labels"].update(a="b"), METADATA),
    ("no labels", lambda volume: volume["metadata"].pop("labels"), METADATA),
    (
        "an annotation",
        lambda volume: volume["metadata"]["annotations"].update({"a": "b"}),
        METADATA,
    ),
]


def rendered(**values):
    return chart.objects({"provisioner": {"enabled": True}, **values})


class Evaluator(startup_taint.Evaluator):
    """The policy's expressions, compiled once."""

    def refusals(self, operation, volume=None, before=None, **request):
        context = {
            "request": celpy.json_to_cel({"operation": operation, **request}),
            "object": celpy.json_to_cel(volume),
            "oldObject": celpy.json_to_cel(before),
            "variables": celpy.json_to_cel({}),
        }
        for name, program in self.variables:
            context["variables"][celpy.celtypes.StringType(name)] = program.evaluate(context)
        return " ".join(said for program, said in self.validations if not program.evaluate(context))


def policy(**values):
    (found,) = [each for each in rendered(**values) if each["kind"] == "ValidatingAdmissionPolicy"]
    return found["spec"]


def secrets():
    """A volume may name a secret of the namespaces whose secrets the controller may read."""
    limited = Evaluator(policy(controller={"secretNamespaces": ["team", "shared"]}))
    anywhere = Evaluator(policy())
    for evaluator, reference, allowed in (
        (limited, {"name": "a", "namespace": "team"}, True),
        (limited, {"name": "a", "namespace": "shared"}, True),
        (limited, {"name": "a", "namespace": "kube-system"}, False),
        (limited, {"name": "a"}, False),
        (anywhere, {"name": "a", "namespace": "kube-system"}, True),
    ):
        volume = changed(lambda volume, secret=reference: volume["spec"]["csi"].update(nodePublishSecretRef=secret))
        said = evaluator.refusals("CREATE", volume)
        if (not said) != allowed or (said and "a secret of team, shared only" not in said):
            yield f"creating a volume with the secret {reference}: {said or 'allowed'}"
    if limited.refusals("CREATE", VOLUME):
        yield "a volume without a secret is refused"


def provisioner():
    """The controller writes volumes of this driver and provisioner, and changes nothing but their finalizer."""
    evaluator = Evaluator(policy())
    cases = [(f"creating {name}", refusal, "CREATE", change, None) for name, change, refusal in CREATED]
    cases += [(f"deleting {name}", refusal, "DELETE", None, change) for name, change, refusal in FOREIGN]
    cases += [("deleting its own", None, "DELETE", None, lambda volume: None)]
    cases += [(name, refusal, "UPDATE", change, lambda volume: None) for name, change, refusal in CHANGES]
    cases += [(f"taking {name}", refusal, "UPDATE", lambda volume: None, change) for name, change, refusal in FOREIGN]
    for name, refusal, operation, after, before in cases:
        said = evaluator.refusals(operation, *(change and changed(change) for change in (after, before)))
        if bool(said) != bool(refusal) or (refusal or "") not in said:
            yield f"{name}: {said or 'allowed'}"
    if not evaluator.refusals("UPDATE", VOLUME, VOLUME, subResource="status"):
        yield "a change of the status is allowed"
    if not evaluator.is_for({"username": ACCOUNT}):
        yield "the policy is not for the controller"
    for other in ("kubernetes-admin", ACCOUNT + "-2", "system:serviceaccount:other:csi-driver-oci-fleet"):
        if evaluator.is_for({"username": other}):
            yield f"the policy is for {other}"
    yield from secrets()
    other = [each for each in rendered(driverName="oci.example.com") if each["kind"] == "ValidatingAdmissionPolicy"]
    if "oci.custom.io" in str(other) or "== 'oci.example.com'" not in str(other):
        yield "another driver's name is not in the policy"


def provisioner_rights():
    """The account has no more rights than are listed here, with preloads and without."""
    events, secrets = ("", "events", "create"), ("", "secrets", "get")
    own = {
        ("", "persistentvolumeclaims", "list watch"),
        ("", "persistentvolumes", "list watch create patch delete"),
        ("storage.k8s.io", "storageclasses", "list watch"),
    }
    for values, wanted in (
        ({}, {events, secrets, *own}),
        ({"controller": {"secretNamespaces": ["team"]}}, {events, *own}),
    ):
        found = {
            (group, resource, " ".join(rule["verbs"]))
            for each in rendered(**values)
            if each["kind"] == "ClusterRole" and each["metadata"]["name"].startswith("csi-driver-oci-")
            for rule in each["rules"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            if "uninstall" not in each["metadata"]["name"]
        }
        for each in sorted(found ^ wanted):
            yield f"{values}: {each}"
    if any("PersistentVolume" in str(each) for each in chart.objects({"controller": {"enabled": True}}) if each["kind"] != "CustomResourceDefinition"):
        yield "without provisioner.enabled, the chart names PersistentVolumes"


CHECKS = (provisioner, provisioner_rights)
