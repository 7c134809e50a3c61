"""Manifests: what Kubernetes and Ray's cluster launcher are asked for, and what is refused."""

import importlib.metadata
import json
import os
from pathlib import Path

import jsonschema
import pytest
import yaml

from lossworks.errors import UserError
from lossworks_jobs.kubernetes.launcher import cluster_yaml
from lossworks_jobs.kubernetes.manifest import POD_SPEC_FILE, job_name, ray_job

SPEC = "name: small\nsteps: 3\ndata:\n  corpus: 'text:/lossworks/a text.txt'\n"
POD = "template.spec"
CONTAINER = f"{POD}.containers[]"

# Every field that a job with a GPU writes; KubeRay drops or refuses others. Checked with the definition of
# KubeRay 1.7.0 (see `definition` below); a slip of the pen shows here without it.
HEAD_FIELDS = """serviceType enableIngress rayStartParams.num-cpus rayStartParams.num-gpus"""
WORKER_FIELDS = """groupName replicas minReplicas maxReplicas rayStartParams.num-cpus rayStartParams.num-gpus
rayStartParams.resources"""
POD_FIELDS = """terminationGracePeriodSeconds automountServiceAccountToken securityContext.runAsNonRoot
securityContext.runAsUser securityContext.fsGroup securityContext.seccompProfile.type volumes[].name
volumes[].persistentVolumeClaim.claimName containers[].name containers[].image containers[].env[].name
containers[].env[].value containers[].envFrom[].secretRef.name containers[].resources.limits.cpu
containers[].resources.limits.memory containers[].resources.requests.cpu
containers[].resources.requests.memory containers[].securityContext.allowPrivilegeEscalation
containers[].securityContext.capabilities.drop[] containers[].volumeMounts[].name
containers[].volumeMounts[].mountPath"""


def written(**changes):
    """Return the ConfigMap and the RayJob."""
    arguments = {
        "name": "My_Run.7",
        "spec_yaml": SPEC,
        "entrypoint": f"lossworks train {POD_SPEC_FILE}",
        "image": "registry.example/lossworks:1.0",
        "workers": 3,
        "resources_per_worker": {"CPU": 4, "GPU": 2, "fast": 1},
        "claim": "runs",
        "environment": {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "OMP_NUM_THREADS": "4"},
        "secret": "lossworks",
    }
    return list(yaml.safe_load_all(ray_job(**{**arguments, **changes})))


def fields(value, path=""):
    """Return the dotted paths of all leaves."""
    if isinstance(value, dict):
        return {field for key, item in value.items() for field in fields(item, f"{path}.{key}")}
    if isinstance(value, list):
        return {field for item in value for field in fields(item, f"{path}[]")}
    return {path.removeprefix(".")}


def cluster_of(job):
    return job["spec"]["rayClusterSpec"]


def pods_of(job):
    """Return the head's and the workers' pod specs."""
    groups = [cluster_of(job)["headGroupSpec"], *cluster_of(job)["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_the_config_map_holds_the_spec_and_nothing_else():
    """Character by character, where the head's mount makes it the file that the entry point names."""
    config, job = written()
    head = pods_of(job)[0]

    assert config == {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": "my-run-7-spec",
            "labels": {"app.kubernetes.io/name": "lossworks", "app.kubernetes.io/instance": "my-run-7"},
        },
        "data": {"spec.yaml": SPEC},
    }
    assert {"name": "spec", "configMap": {"name": "my-run-7-spec"}} in head["volumes"]
    mount = next(mount for mount in head["containers"][0]["volumeMounts"] if mount["name"] == "spec")
    assert f"{mount['mountPath']}/{next(iter(config['data']))}" == POD_SPEC_FILE
    assert POD_SPEC_FILE in job["spec"]["entrypoint"]


def test_the_fields_are_those_of_the_definition():
    """None is misspelt or at the wrong depth."""
    cluster = cluster_of(written()[1])
    pod = {f"template.spec.{name}" for name in POD_FIELDS.split()}
    spec = {f"{POD}.volumes[].configMap.name", f"{CONTAINER}.volumeMounts[].readOnly"}
    gpu = {f"{CONTAINER}.resources.{kind}.nvidia.com/gpu" for kind in ("limits", "requests")}

    assert set(cluster) == {
        "rayVersion", "authOptions", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs",
    }  # fmt: skip
    assert fields(cluster["headGroupSpec"]) == {*HEAD_FIELDS.split(), *pod, *spec}
    assert fields(cluster["workerGroupSpecs"][0]) == {*WORKER_FIELDS.split(), *pod, *gpu}


def test_a_worker_is_a_pod_and_the_head_trains_nothing():
    """Ray counts on a pod what its container may use."""
    cluster = cluster_of(written()[1])
    (workers,) = cluster["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]

    assert cluster["rayVersion"] == importlib.metadata.version("ray")
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    assert {workers[name] for name in ("replicas", "minReplicas", "maxReplicas")} == {3}
    assert limits == {"cpu": "4", "memory": "8Gi", "nvidia.com/gpu": 2}
    assert workers["rayStartParams"] == {"num-cpus": "4", "num-gpus": "2", "resources": "'{\"fast\": 1}'"}


def test_without_gpus_none_is_asked_for():
    """A node without the device plugin could not take the pod."""
    job = written(resources_per_worker={})[1]

    assert "nvidia.com/gpu" not in json.dumps(job)
    assert cluster_of(job)["workerGroupSpecs"][0]["rayStartParams"] == {"num-cpus": "1", "num-gpus": "0"}


def test_pods_are_ordinary_users_and_get_time_to_save():
    """No root, no more rights than at the start, a token for Ray, and seconds between SIGTERM and SIGKILL."""
    job = written(graceful_s=300)[1]
    head, workers = pods_of(job)

    assert cluster_of(job)["authOptions"] == {"mode": "token"}
    assert cluster_of(job)["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster_of(job)["headGroupSpec"]["enableIngress"] is False
    for pod in (head, workers):
        (container,) = pod["containers"]
        assert pod["terminationGracePeriodSeconds"] == 300
        assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "300"} in container["env"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_home_environment_and_secret_reach_every_pod():
    """The home lies on the claim, usage reports are off, and the secret is a name."""
    for pod in pods_of(written()[1]):
        (container,) = pod["containers"]
        variables = {item["name"]: item["value"] for item in container["env"]}
        assert {"name": "home", "persistentVolumeClaim": {"claimName": "runs"}} in pod["volumes"]
        assert {"name": "home", "mountPath": variables["LOSSWORKS_HOME"]} in container["volumeMounts"]
        assert variables["RAY_USAGE_STATS_ENABLED"] == "0"
        assert variables["OMP_NUM_THREADS"] == "4"
        assert container["envFrom"] == [{"secretRef": {"name": "lossworks"}}]


def test_without_claim_and_secret_none_is_mentioned():
    """The workers' pods then need no volume at all."""
    head, workers = pods_of(written(claim=None, secret=None)[1])

    assert "volumes" not in workers
    assert "volumeMounts" not in workers["containers"][0]
    assert "envFrom" not in head["containers"][0]
    assert "LOSSWORKS_HOME" not in {item["name"] for item in head["containers"][0]["env"]}


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("demo", "demo"),
        ("My Run_7", "my-run-7"),
        ("7 runs", "run-7-runs"),
        ("-ümlaut-", "mlaut"),
        ("a" * 60, "a" * 47),
        ("a" * 46 + "-b", "a" * 46),
    ],
)
def test_names_become_valid(name, valid):
    """RFC 1035 in 47 characters, and the ConfigMap's in 63."""
    assert job_name(name) == valid
    assert len(written(name=name)[0]["metadata"]["name"]) <= 63


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "äöü"}, "has no letter or digit"),
        ({"workers": 0}, "workers=0: must be at least 1"),
        ({"graceful_s": 0}, "graceful_s=0: must be at least 1"),
        ({"resources_per_worker": {"CPU": 0.5}}, "CPU=0.5: on Kubernetes a worker is a pod"),
        ({"resources_per_worker": {"GPU": 0.5}}, "GPU=0.5: on Kubernetes a worker is a pod"),
        ({"resources_per_worker": {"it's": 1}}, "can't be asked for on Kubernetes"),
        ({"image": "two words"}, "image='two words'"),
        ({"entrypoint": " "}, "entrypoint=' '"),
        ({"claim": "Not Valid"}, "claim='Not Valid': is no name of a Kubernetes object"),
        ({"secret": "s3cret!"}, "secret='s3cret!': is no name of a Kubernetes object"),
        ({"environment": {"MLFLOW_TRACKING_PASSWORD": "x"}}, "MLFLOW_TRACKING_PASSWORD: looks like a secret"),
        ({"environment": {"HF_TOKEN": "x"}}, "HF_TOKEN: looks like a secret"),
        ({"environment": {"URI": "http://me:pw@host"}}, "URI: looks like a secret"),
        ({"environment": {"A B": "x"}}, "A B: is no name of a variable"),
        ({"spec_yaml": "a" * 2_000_000}, "too many for a ConfigMap"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused(changes, message):
    """The sentence names the argument and its value."""
    with pytest.raises(UserError, match=message):
        written(**changes)


def definition():
    """Return KubeRay's schema of a RayJob with unknown fields refused, from its published definition.

    The file is helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml of github.com/ray-project/kuberay.
    """
    path = os.environ.get("LOSSWORKS_KUBERAY_RAYJOBS")
    if not path:
        pytest.skip("LOSSWORKS_KUBERAY_RAYJOBS must name KubeRay's ray.io_rayjobs.yaml")
    versions = yaml.load(Path(path).read_text(), Loader=yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = [item["schema"]["openAPIV3Schema"] for item in versions if item["name"] == "v1"]
    return closed(schema)


def closed(schema):
    """Refuse unknown fields wherever a schema lists the known ones."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result["additionalProperties"] = False
    return result


def test_jobs_fit_the_published_definition():
    """With and without GPUs, claim and secret; a misspelt field at any depth does not."""
    schema = definition()
    bare = {"resources_per_worker": {}, "claim": None, "secret": None, "environment": {}}
    for changes in ({}, bare):
        jsonschema.validate(written(**changes)[1], schema)
    for misspell in (
        lambda job: job["spec"].update(backOffLimit=1),
        lambda job: cluster_of(job)["headGroupSpec"].update(rayStartParam={}),
        lambda job: pods_of(job)[1].update(terminationGraceSeconds=1),
        lambda job: pods_of(job)[1]["containers"][0].update(envfrom=[]),
    ):
        job = written()[1]
        misspell(job)
        with pytest.raises(jsonschema.ValidationError, match="Additional properties are not allowed"):
            jsonschema.validate(job, schema)


def launched(**arguments):
    """Return a cluster launcher's file, after Ray's own check of its schema."""
    import ray.autoscaler

    values = yaml.safe_load(cluster_yaml("small", **arguments))
    schema = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
    jsonschema.validate(values, schema)
    with pytest.raises(jsonschema.ValidationError, match="Additional properties"):
        jsonschema.validate({**values, "setup_command": []}, schema)
    return values


def test_machines_of_ones_own():
    """Ray prepares it: a node type that holds all workers; every node asks for the token."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    values = launched(
        head_ip="10.0.0.1", worker_ips=["10.0.0.2", "node3.example"], setup=["pip install lossworks"]
    )
    prepared = prepare_config(values)
    validate_config(prepared)
    (node,) = prepared["available_node_types"].values()

    assert (node["min_workers"], node["max_workers"]) == (2, 2)
    assert values["provider"]["worker_ips"] == ["10.0.0.2", "node3.example"]
    assert values["setup_commands"] == ["chmod 600 ~/.ray/auth_token", "pip install lossworks"]


@pytest.mark.parametrize("arguments", [{"head_ip": "10.0.0.1"}, {"provider": "aws", "workers": 4}])
def test_nodes_ask_for_the_token_and_hide_the_dashboard(arguments):
    """The token is a file that travels; it is in no command."""
    values = launched(**arguments, token_file="/secure/token")  # noqa: S106  (a path)
    head, worker = values["head_start_ray_commands"][-1], values["worker_start_ray_commands"][-1]

    assert values["file_mounts"] == {"~/.ray/auth_token": "/secure/token"}
    assert all("RAY_AUTH_MODE=token" in command for command in (head, worker))
    assert "--dashboard-host=127.0.0.1" in head
    assert worker.endswith("--address=$RAY_HEAD_IP:6379")


def test_instances_of_a_cloud():
    """All workers are there from the start, and the head trains nothing."""
    values = launched(provider="aws", workers=4, worker_type="p4d.24xlarge", region="eu-west-1")
    types = values["available_node_types"]

    assert values["provider"]["region"] == "eu-west-1"
    assert types[values["head_node_type"]]["resources"] == {"CPU": 0}
    assert (types["worker"]["min_workers"], types["worker"]["max_workers"], values["max_workers"]) == (
        4,
        4,
        4,
    )
    assert types["worker"]["node_config"] == {"InstanceType": "p4d.24xlarge"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "head_ip: is missing"),
        ({"head_ip": "10.0.0.300"}, "'10.0.0.300': is neither an IP address nor a host's name"),
        ({"head_ip": "10.0.0.1", "worker_ips": ["10.0.0.1"]}, "each machine once, and not the head"),
        ({"head_ip": "a; rm"}, "'a; rm': is neither"),
        ({"provider": "gcp"}, "provider=gcp: use local or aws"),
        ({"provider": "aws", "workers": 0}, "workers=0: must be at least 1"),
    ],
)
def test_what_can_not_be_launched_is_refused(arguments, message):
    """Before Ray sees it."""
    with pytest.raises(UserError, match=message):
        cluster_yaml("small", **arguments)
