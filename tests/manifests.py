"""Whether the Kubernetes objects in `launch/k8s` keep to their schemas.

Those of Kubernetes' own objects are its own, closed (the package kubernetes-validate). That of a TrainJob is written by
hand from Kubeflow's documentation, and knows only fields that such manifests have a use for. So a misspelt field, which
an API server may drop in silence, is found.
"""

from __future__ import annotations

from typing import Any

import jsonschema
import kubernetes_validate

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
KUBERNETES = "1.31"  # the oldest that has all fields we use


def check(one: dict[str, Any]) -> None:
    """Raises jsonschema's ValidationError for an object that an API server would not take as it is meant."""
    if str(one.get("apiVersion")).startswith("trainer.kubeflow.org/"):
        jsonschema.validate(one, TRAINJOB)
    elif not {"apiVersion", "kind"} <= one.keys():
        raise jsonschema.ValidationError("it does not say what it is")
    else:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
