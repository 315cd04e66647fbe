"""JSON schemas of the Kubernetes objects in `launch/k8s`, written by hand from the public API documentation.

They are closed: they know only fields that such manifests have a use for, so that a misspelt one, which an API server
may drop in silence, is found. They are not the schemas of a running API server.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def closed(required: str = "", **fields: Schema) -> Schema:
    """An object with these fields and no other ones."""
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


def several(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, "minItems": 1, **more}


def one_of(schema: Schema, *fields: str) -> Schema:
    """Exactly one of `fields` is given."""
    return {**schema, "oneOf": [{"required": [field]} for field in fields]}


TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 1}
SECONDS: Schema = {"type": "integer", "minimum": 0}
NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
PATH: Schema = {"type": "string", "pattern": "^/"}
TEXTS = several(TEXT)
LABELS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITY: Schema = {"anyOf": [SECONDS, {"type": "string", "pattern": "^[0-9]+([.][0-9]+)?([KMGTP]i?|m|k)?$"}]}
QUANTITIES: Schema = {"type": "object", "additionalProperties": QUANTITY}
METADATA = closed("name", name=NAME, namespace=NAME, labels=LABELS, annotations=LABELS)

FIELD = closed("fieldRef", fieldRef=closed("fieldPath", fieldPath=TEXT))
VARIABLE = {"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*$"}
ENV = several(one_of(closed("name", name=VARIABLE, value=TEXT, valueFrom=FIELD), "value", "valueFrom"))
RESOURCES = closed(limits=QUANTITIES, requests=QUANTITIES)
MOUNTS = several(closed("name mountPath", name=NAME, mountPath=PATH, subPath=TEXT, readOnly=FLAG))
CLAIM = closed("claimName", claimName=NAME, readOnly=FLAG)
EMPTY = closed(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY)
VOLUME = closed("name", name=NAME, persistentVolumeClaim=CLAIM, emptyDir=EMPTY)
VOLUMES = several(one_of(VOLUME, "persistentVolumeClaim", "emptyDir"))

PORT = closed("port", name=NAME, port={"type": "integer", "minimum": 1, "maximum": 65535})
SERVICE = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "v1"},
    kind={"const": "Service"},
    metadata=METADATA,
    spec=closed("selector", clusterIP=TEXT, publishNotReadyAddresses=FLAG, selector=LABELS, ports=several(PORT)),
)

CONTAINER = closed(
    "name image",
    name=NAME,
    image=TEXT,
    command=TEXTS,
    args=TEXTS,
    workingDir=PATH,
    env=ENV,
    resources=RESOURCES,
    volumeMounts=MOUNTS,
)
POD = closed(
    "restartPolicy containers",
    restartPolicy={"enum": ["Never", "OnFailure"]},
    subdomain=NAME,
    terminationGracePeriodSeconds=SECONDS,
    nodeSelector=LABELS,
    containers=several(CONTAINER),
    volumes=VOLUMES,
)
EXIT_CODES = closed(
    "operator values", containerName=NAME, operator={"enum": ["In", "NotIn"]}, values=several({"type": "integer"})
)
CONDITION = closed("type", type=TEXT, status={"enum": ["True", "False", "Unknown"]})
ACTION = {"enum": ["FailJob", "FailIndex", "Ignore", "Count"]}
RULE = closed("action", action=ACTION, onExitCodes=EXIT_CODES, onPodConditions=several(CONDITION))
NEVER = {"properties": {"template": {"properties": {"spec": {"properties": {"restartPolicy": {"const": "Never"}}}}}}}
JOB_SPEC = closed(
    "template",
    completionMode={"enum": ["NonIndexed", "Indexed"]},
    completions=COUNT,
    parallelism=COUNT,
    backoffLimit=SECONDS,
    activeDeadlineSeconds=COUNT,
    podFailurePolicy=closed("rules", rules=several(one_of(RULE, "onExitCodes", "onPodConditions"))),
    template=closed("spec", metadata=closed(labels=LABELS), spec=POD),
) | {"if": {"required": ["podFailurePolicy"]}, "then": NEVER}
JOB = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "batch/v1"},
    kind={"const": "Job"},
    metadata=METADATA,
    spec=JOB_SPEC,
)

PATCHED_POD = closed(
    terminationGracePeriodSeconds=SECONDS,
    nodeSelector=LABELS,
    containers=several(closed("name", name=NAME, env=ENV, volumeMounts=MOUNTS)),
    volumes=VOLUMES,
)
PATCHED_JOB = closed("name", name=NAME, template=closed(spec=closed(template=closed(spec=PATCHED_POD))))
PATCH = closed(template=closed(spec=closed(replicatedJobs=several(PATCHED_JOB))))
TRAINER = closed(
    image=TEXT, command=TEXTS, args=TEXTS, numNodes=COUNT, numProcPerNode=COUNT, env=ENV, resourcesPerNode=RESOURCES
)
TRAINJOB = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "trainer.kubeflow.org/v1alpha1"},
    kind={"const": "TrainJob"},
    metadata=METADATA,
    spec=closed(
        "runtimeRef",
        runtimeRef=closed("name", name=NAME, apiGroup=TEXT, kind=TEXT),
        suspend=FLAG,
        activeDeadlineSeconds=COUNT,
        trainer=TRAINER,
        runtimePatches=several(closed("manager", manager=TEXT, trainingRuntimeSpec=PATCH)),
    ),
)
SCHEMAS = {"Service": SERVICE, "Job": JOB, "TrainJob": TRAINJOB}
