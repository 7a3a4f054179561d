"""What is deployed: the manifests and units are valid, agree with each other, and with the program."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from sseproxy import config
from sseproxy.config.values import DOCUMENT
from sseproxy.observe.metrics import METRICS

from .served import program

ROOT = Path(__file__).parent.parent
KUBERNETES = ROOT / "configs" / "kubernetes"
SYSTEMD = ROOT / "configs" / "systemd"
COMPOSE = ROOT / "configs" / "compose"
# The oldest that is still maintained.
KUBERNETES_VERSION = "1.33"
MANIFESTS = sorted(
    path for path in KUBERNETES.glob("*.yaml") if path.name not in ("kustomization.yaml", "sseproxy.yaml")
)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def seconds(duration: str) -> float:
    return config.Timeouts.model_validate({"idle": duration}, context=DOCUMENT).idle


@pytest.mark.parametrize("path", [path for path in MANIFESTS if path.stem != "podmonitor"], ids=lambda path: path.stem)
def test_a_manifest_is_valid(path: Path) -> None:
    kubernetes_validate.validate(load(path), KUBERNETES_VERSION, strict=True)


def test_the_podmonitor_is_valid() -> None:
    schema = json.loads((Path(__file__).parent / "podmonitor.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(load(KUBERNETES / "podmonitor.yaml"))


def test_kustomize_takes_every_manifest() -> None:
    kustomization = load(KUBERNETES / "kustomization.yaml")
    assert sorted(kustomization["resources"]) == [path.name for path in MANIFESTS]
    assert kustomization["configMapGenerator"][0]["files"] == ["sseproxy.yaml"]


def test_everything_selects_the_pods_of_the_deployment() -> None:
    labels = load(KUBERNETES / "deployment.yaml")["spec"]["template"]["metadata"]["labels"]
    selectors = [
        *(load(KUBERNETES / f"{name}.yaml")["spec"]["selector"] for name in ("service",)),
        *(
            load(KUBERNETES / f"{name}.yaml")["spec"]["selector"]["matchLabels"]
            for name in ("deployment", "poddisruptionbudget", "podmonitor")
        ),
        load(KUBERNETES / "networkpolicy.yaml")["spec"]["podSelector"]["matchLabels"],
    ]
    assert selectors == [labels] * len(selectors)


def test_a_pod_has_the_time_to_drain_and_the_configuration_that_it_is_given(tmp_path: Path) -> None:
    pod = load(KUBERNETES / "deployment.yaml")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    text = (KUBERNETES / "sseproxy.yaml").read_text()
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    key = load(KUBERNETES / "sseproxy.yaml")["upstreams"][0]["api_key_file"]
    assert Path(key).parent == Path(mounted["keys"])
    assert container["args"] == ["serve", "-c", f"{mounted['config']}/sseproxy.yaml"]
    (tmp_path / "openai").write_text("sk-x")
    settings = config.parse(text.replace(mounted["keys"], str(tmp_path)), "sseproxy.yaml", {})
    (_, pre_stop) = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] >= int(pre_stop) + settings.drain_timeout + 10
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert settings.listen == (config.Address("0.0.0.0", ports["http"]),)
    assert settings.admin.listen == config.Address("0.0.0.0", ports["admin"])


def test_the_autoscaler_scales_by_a_metric_that_exists() -> None:
    (metric,) = load(KUBERNETES / "horizontalpodautoscaler.yaml")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in {f"sseproxy_{known.name}" for known in METRICS}


def test_the_dockerfile_is_clean() -> None:
    found = subprocess.run(
        [Path(sys.executable).parent / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (0, "")


def test_the_dockerfile_runs_as_nobody_and_copies_what_the_build_needs() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^USER [1-9]\d+:[1-9]\d+$", text, re.M)
    assert re.search(r"^ENTRYPOINT \[", text, re.M)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for source in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M):
        for name in source.split():
            assert (ROOT / name).exists()
            assert f"!{name}" in ignored


def test_the_units_are_valid(tmp_path: Path) -> None:
    analyze = program("systemd-analyze")
    # It looks for what is executed.
    executable = tmp_path / "sseproxy"
    executable.write_text("#!/bin/sh\n")
    executable.chmod(0o755)
    for unit in SYSTEMD.iterdir():
        text = unit.read_text().replace("/opt/sseproxy/bin/sseproxy", str(executable))
        (tmp_path / unit.name).write_text(text)
    found = subprocess.run(
        [
            analyze,
            "verify",
            "--man=no",
            "--recursive-errors=no",
            *sorted(tmp_path.glob("*.s*t")),
            tmp_path / "sseproxy.service",
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"SYSTEMD_LOG_LEVEL": "warning"},
    )
    complaints = [line for line in found.stderr.splitlines() if "sseproxy." in line]
    assert not complaints


def test_the_unit_reloads_with_a_systemd_that_does_not_know_how_itself() -> None:
    """Debian 12 has systemd 252. It knows no Type=notify-reload, and would neither wait for the start nor reload."""
    service = (SYSTEMD / "sseproxy.service").read_text()
    assert re.findall(r"^(?:Type|ExecReload)=.*$", service, re.M) == [
        "Type=notify",
        "ExecReload=/bin/kill -HUP $MAINPID",
    ]


def test_the_unit_waits_for_the_drain_and_names_a_socket_that_a_configuration_can() -> None:
    service, sock = ((SYSTEMD / f"sseproxy.{kind}").read_text() for kind in ("service", "socket"))
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", service, re.M)
    assert int(stop) > config.single("http://h").drain_timeout + 10
    (name,) = re.findall(r"^FileDescriptorName=(\S+)$", sock, re.M)
    assert f"listen: systemd:{name}" in sock
    assert config.PassedSocket.parse(f"systemd:{name}").name == name


def test_compose_mounts_what_exists_and_gives_the_drain_its_time() -> None:
    services = load(COMPOSE / "compose.yaml")["services"]
    for service in services.values():
        for volume in service.get("volumes", ()):
            source = (COMPOSE / volume.split(":")[0]).resolve()
            assert source.exists(), source
    settings = config.load(COMPOSE / "sseproxy.yaml", {"UPSTREAM_URL": "http://h/v1"})
    assert seconds(services["sseproxy"]["stop_grace_period"]) > settings.drain_timeout + 5
    targets = load(COMPOSE / "prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    assert isinstance(settings.admin.listen, config.Address)
    assert targets == [f"sseproxy:{settings.admin.listen.port}"]


def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    promtool = program("promtool")
    shutil.copytree(ROOT / "grafana" / "rules", tmp_path / "rules")
    shutil.copy(COMPOSE / "prometheus.yml", tmp_path)
    found = subprocess.run(
        [promtool, "check", "config", tmp_path / "prometheus.yml"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
