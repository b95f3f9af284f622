"""What can be said of the deployment files without a container engine: nothing open, nothing unpinned, no secret."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SERVERS = {name: service for name, service in SERVICES.items() if service.get("restart") != "no"}
RAY_NODES = ("head", "worker")
KUBERNETES = {path.name: yaml.safe_load(path.read_text()) for path in sorted((DOCKER / "kubernetes").glob("*.yaml"))}
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
SCRIPTS = sorted(DOCKER.glob("*.sh"))

# The fields that KubeRay 1.6 documents (docs.ray.io, "KubeRay CRD API reference") for what the manifests use, with
# their types; a pod template is Kubernetes' own, of which the parts that these manifests use are listed here.
STRINGS = {"*": str}
PROBE = {
    "httpGet": {"path": str, "port": int},
    "periodSeconds": int,
    "timeoutSeconds": int,
    "failureThreshold": int,
    "initialDelaySeconds": int,
}
CONTAINER = {
    "name": str,
    "image": str,
    "securityContext": {"allowPrivilegeEscalation": bool, "capabilities": {"drop": [str]}},
    "env": [{"name": str, "value": str, "valueFrom": {"secretKeyRef": {"name": str, "key": str}}}],
    "ports": [{"name": str, "containerPort": int}],
    "resources": {"requests": STRINGS, "limits": STRINGS},
    "readinessProbe": PROBE,
    "livenessProbe": PROBE,
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
}
POD = {
    "metadata": {"labels": STRINGS},
    "spec": {
        "restartPolicy": str,
        "automountServiceAccountToken": bool,
        "enableServiceLinks": bool,
        "securityContext": {
            "runAsNonRoot": bool,
            "runAsUser": int,
            "runAsGroup": int,
            "fsGroup": int,
            "seccompProfile": {"type": str},
        },
        "containers": [CONTAINER],
        "volumes": [
            {
                "name": str,
                "emptyDir": {"medium": str, "sizeLimit": str},
                "secret": {"secretName": str, "defaultMode": int},
                "configMap": {"name": str},
            }
        ],
    },
}
RAY_CLUSTER = {
    "rayVersion": str,
    "authOptions": {"mode": str},
    "headGroupSpec": {"serviceType": str, "rayStartParams": STRINGS, "template": POD},
    "workerGroupSpecs": [
        {
            "groupName": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "rayStartParams": STRINGS,
            "template": POD,
        }
    ],
}
RAY_JOB = {
    "entrypoint": str,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "backoffLimit": int,
    "submitterPodTemplate": POD,
    "rayClusterSpec": RAY_CLUSTER,
}


def contradictions(value: object, form: Any, place: str) -> Iterator[str]:
    """Yield where `value` has a field or a type that `form` does not know."""
    if isinstance(form, type):
        if type(value) is not form:
            yield f"{place}: {value!r} is no {form.__name__}"
    elif isinstance(form, list):
        for position, item in enumerate(value if isinstance(value, list) else [value]):
            yield from contradictions(item, form[0], f"{place}[{position}]")
    elif not isinstance(value, dict):
        yield f"{place}: {value!r} is no mapping"
    else:
        for key, item in value.items():
            known = form.get(key, form.get("*"))
            yield from [f"{place}.{key}: unknown"] if known is None else contradictions(item, known, f"{place}.{key}")


def ray_clusters() -> list[dict[str, Any]]:
    return [KUBERNETES["raycluster.yaml"]["spec"], KUBERNETES["rayjob.yaml"]["spec"]["rayClusterSpec"]]


def pods() -> list[dict[str, Any]]:
    templates = [KUBERNETES["rayjob.yaml"]["spec"]["submitterPodTemplate"]]
    for cluster in ray_clusters():
        templates += [
            cluster["headGroupSpec"]["template"],
            *(group["template"] for group in cluster["workerGroupSpecs"]),
        ]
    return [template["spec"] for template in templates]


def images() -> list[str]:
    return [service["image"] for service in SERVICES.values()] + [
        container["image"] for pod in pods() for container in pod["containers"]
    ]


def locked(package: str) -> str:
    match = re.search(rf"^{package}==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert match is not None
    return match[1]


def test_every_image_names_its_version() -> None:
    bases = re.findall(r"^ARG BASE=(\S+)|^FROM (?!\$\{BASE\})(\S+)", DOCKERFILE, re.MULTILINE)
    named = [*images(), *("".join(base) for base in bases)]
    assert [image for image in named if not re.search(r":\d+(\.\d+)+[\w.-]*$", image)] == []


def test_the_images_that_we_build_carry_our_version() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert {image for image in images() if image.startswith("dab:")} == {f"dab:{version[1]}"}


@pytest.mark.parametrize("name", SERVERS)
def test_a_service_that_stays_has_a_health_check(name: str) -> None:
    assert SERVERS[name]["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_loopback_only(name: str) -> None:
    assert [port for port in SERVICES[name].get("ports", []) if not port.startswith("127.0.0.1:")] == []


def test_only_the_dashboard_and_mlflow_are_published() -> None:
    assert {name for name, service in SERVICES.items() if service.get("ports")} == {"head", "mlflow"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_runs_without_root_and_capabilities(name: str) -> None:
    service = SERVICES[name]
    assert service["image"].startswith("dab:") or service["user"] not in ("root", "0", "0:0")
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")


def test_the_image_runs_as_a_user_without_rights() -> None:
    users = re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE)
    assert users[-1] == "10001:10001"


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_on_the_private_network_alone(name: str) -> None:
    assert SERVICES[name]["networks"] == ["inside"]
    assert "network_mode" not in SERVICES[name]


@pytest.mark.parametrize("name", SERVICES)
def test_secrets_come_from_files(name: str) -> None:
    for variable, value in SERVICES[name].get("environment", {}).items():
        if re.search(r"PASSWORD|SECRET|TOKEN|CREDENTIAL|(^|_)KEY", variable):
            assert str(value).startswith("/run/secrets/"), variable
    assert not [word for word in SERVICES[name].get("command", []) if re.search(r"://[^/@]*:[^/@]*@", word)]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_given_just_the_secrets_that_it_names(name: str) -> None:
    text = json.dumps(SERVICES[name])
    assert set(SERVICES[name].get("secrets", [])) == set(re.findall(r"/run/secrets/(\w+)", text))


def test_every_secret_is_made_by_the_script(tmp_path: Path) -> None:
    script = tmp_path / "secrets.sh"
    script.write_bytes((DOCKER / "secrets.sh").read_bytes())
    for _ in range(2):
        subprocess.run(["sh", str(script)], check=True, capture_output=True)
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert {secret["file"] for secret in COMPOSE["secrets"].values()} == {f"secrets/{name}" for name in made}
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    assert len({text for name, text in made.items() if not name.startswith("s3_")}) == 4
    assert re.fullmatch("[0-9a-f]{64}", made["ray_token"])
    identities = json.loads(made["s3_identities"])["identities"]
    keys = {identity["name"]: identity["credentials"][0]["secretKey"] for identity in identities}
    assert all(f"aws_secret_access_key = {key}\n" in made[f"s3_{user}"] for user, key in keys.items())


def test_secrets_made_once_stay(tmp_path: Path) -> None:
    script = tmp_path / "secrets.sh"
    script.write_bytes((DOCKER / "secrets.sh").read_bytes())
    texts = []
    for _ in range(2):
        subprocess.run(["sh", str(script)], check=True, capture_output=True)
        texts.append({path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()})
    assert texts[0] == texts[1]


def test_secrets_are_kept_out_of_git_and_of_the_image() -> None:
    assert (DOCKER / ".gitignore").read_text().split() == ["secrets/"]
    allowed = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert allowed[0] == "*"
    assert not [line for line in allowed if line.startswith("!") and ("secret" in line or line in ("!docker", "!.git"))]
    assert not re.search(r"^(?:ARG|ENV)\b.*(?:PASSWORD|TOKEN=|SECRET|INDEX)", DOCKERFILE, re.MULTILINE)


def test_the_image_gets_every_file_that_it_copies() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE)
    mounted = re.findall(r"type=bind,source=([\w./-]+)", DOCKERFILE)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {*(name for line in copied for name in line.split()), *mounted} == allowed
    assert [name for name in allowed if not (ROOT / name).exists()] == []


def test_the_choice_of_torch_is_unset_by_default() -> None:
    assert re.search(r"^ARG TORCH_BACKEND$", DOCKERFILE, re.MULTILINE)
    assert SERVICES["head"]["build"]["args"] == {"TORCH_BACKEND": "${TORCH_BACKEND:-}"}


def test_what_the_server_needs_beside_the_lock_is_pinned_and_no_second_version() -> None:
    lines = [line for line in (DOCKER / "server.lock").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[\w.]+", line)] == []
    names = {line.split("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line}
    assert {line.split("==")[0] for line in lines} & names == set()


@pytest.mark.parametrize("name", RAY_NODES)
def test_every_ray_node_needs_the_token(name: str) -> None:
    environment = SERVICES[name]["environment"]
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
    assert re.search(r"^\s+RAY_AUTH_MODE=token\b", DOCKERFILE, re.MULTILINE)


@pytest.mark.parametrize("name", RAY_NODES)
def test_a_ray_node_has_more_shared_memory_than_docker_gives(name: str) -> None:
    gigabytes = re.fullmatch(r"(\d+)gb", SERVICES[name]["shm_size"])
    assert gigabytes is not None
    assert int(gigabytes[1]) >= 1


def test_gpu_workers_are_started_like_the_others() -> None:
    gpu = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())["services"]["worker"]
    plain = [word for word in SERVICES["worker"]["command"] if not word.startswith("--num-gpus")]
    assert [word for word in gpu["command"] if not word.startswith("--num-gpus")] == plain


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(script: Path) -> None:
    subprocess.run(["sh", "-n", str(script)], check=True)


def test_a_program_gets_its_secrets_from_the_files_that_are_named(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("it's $HOME\n")
    environment = {"PATH": os.environ["PATH"], "PGPASSWORD_FILE": str(tmp_path / "password")}
    shown = subprocess.run(
        ["sh", str(DOCKER / "entrypoint.sh"), "env"], env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert "PGPASSWORD=it's $HOME\n" in shown
    assert "PGPASSWORD_FILE" not in shown


def test_a_missing_secret_is_named_and_nothing_starts(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "PGPASSWORD_FILE": str(tmp_path / "none")}
    done = subprocess.run(
        ["sh", str(DOCKER / "entrypoint.sh"), "echo", "started"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("PGPASSWORD_FILE: ")


def test_manifests_have_the_fields_and_types_that_kuberay_documents() -> None:
    forms = {"raycluster.yaml": RAY_CLUSTER, "rayjob.yaml": RAY_JOB}
    kinds = {"raycluster.yaml": "RayCluster", "rayjob.yaml": "RayJob"}
    for name, form in forms.items():
        assert (KUBERNETES[name]["apiVersion"], KUBERNETES[name]["kind"]) == ("ray.io/v1", kinds[name])
        assert list(contradictions(KUBERNETES[name]["spec"], form, name)) == []


def test_a_wrong_field_in_a_manifest_is_found() -> None:
    spec = {"rayVersion": 2.6, "headGroupSpec": {"rayStartParams": {"num-cpus": 2}, "replica": 1}}
    assert list(contradictions(spec, RAY_CLUSTER, "x")) == [
        "x.rayVersion: 2.6 is no str",
        "x.headGroupSpec.rayStartParams.num-cpus: 2 is no str",
        "x.headGroupSpec.replica: unknown",
    ]


def test_clusters_on_kubernetes_need_a_token_and_run_the_locked_ray() -> None:
    for cluster in ray_clusters():
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["rayVersion"] == locked("ray")
        assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_the_cluster_of_a_job_is_the_cluster_that_stays_and_its_configuration() -> None:
    stays, job = ray_clusters()
    text = json.dumps(job)
    for added in (
        ', {"name": "config", "mountPath": "/config", "readOnly": true}',
        ', {"name": "config", "configMap": {"name": "dab-run"}}',
    ):
        assert added in text
        text = text.replace(added, "")
    assert json.loads(text) == stays


def test_pods_run_without_root_and_with_limits() -> None:
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert set(container["resources"]["limits"]) >= {"cpu", "memory"}


def test_ray_pods_have_health_checks_and_shared_memory() -> None:
    for pod in pods()[1:]:
        assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}} in pod["volumes"]
        for container in pod["containers"]:
            assert {"readinessProbe", "livenessProbe"} <= set(container)
            assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]


def test_no_secret_stands_in_a_manifest() -> None:
    for pod in pods():
        for container in pod["containers"]:
            for variable in container.get("env", []):
                if re.search(r"PASSWORD|SECRET|TOKEN|(^|_)KEY", variable["name"]):
                    assert set(variable) == {"name", "valueFrom"}


def test_the_network_policy_lets_in_the_cluster_and_who_submits() -> None:
    policy = KUBERNETES["network-policy.yaml"]["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    assert all(rule["from"] for rule in policy["ingress"])
    assert policy["ingress"][1]["ports"] == [{"protocol": "TCP", "port": 8265}]


def test_the_commands_of_the_guide_give_containers_what_they_name_and_keep_tokens_from_others() -> None:
    guide = (ROOT / "docs" / "deployment.md").read_text()
    several, _, kubernetes = guide.partition("## Several machines")[2].partition("## Kubernetes")
    run = several.partition("docker run")[2].partition("'")[0]
    assert {"/etc/dab:/secrets:ro", "/mnt/dab:/mnt/dab", "dab-home:/var/lib/dab"} <= set(run.split())
    assert "chown 10001:10001 /etc/dab/*" in several
    assert "--tracking" in several
    written = [line for line in (several + kubernetes).splitlines() if re.search(r"> \S*(token|password)\b", line)]
    assert len(written) == 3
    assert all(line.startswith("(umask 077; ") for line in written)
