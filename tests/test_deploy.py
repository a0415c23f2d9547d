"""What deploy/ has does what it says: rules and dashboard with a real Prometheus, manifests against the schemas."""

import http.server
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import threading

import pytest
import requests
import yaml
from conftest import ROOT, SAMPLES, free_ports, needs_nginx, post, run, wait_until

import serve

MONITORING = ROOT / "deploy" / "monitoring"
needs_prometheus = pytest.mark.skipif(not shutil.which("promtool"), reason="needs Debian's package prometheus")


def expressions() -> list[str]:
    """What the dashboard's panels ask for."""
    board = json.loads((MONITORING / "dashboard.json").read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


@needs_prometheus
def test_the_rules_are_valid_and_say_what_their_examples_say():
    for command in ("check config prometheus.yml", "check rules rules.yml", "test rules rules-test.yml"):
        done = subprocess.run(["promtool", *command.split()], cwd=MONITORING, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_an_example():
    alerts = re.findall(r"- alert: (\w+)", (MONITORING / "rules.yml").read_text())
    assert set(alerts) == set(re.findall(r"- alertname: (\w+)", (MONITORING / "rules-test.yml").read_text()))


def test_the_dashboard_is_what_its_program_makes():
    pytest.importorskip("grafana_foundation_sdk", reason="needs deploy/requirements.txt")
    made = run("deploy/monitoring/dashboard.py")
    assert made.returncode == 0, made.stderr
    assert made.stdout == (MONITORING / "dashboard.json").read_text()


@needs_prometheus
@pytest.mark.slow
def test_each_panel_shows_values_of_a_server_that_works(new_server, digits_pt, tmp_path):
    server = new_server(digits_pt, live={})
    server.start()
    [port] = free_ports(1)
    config = (MONITORING / "prometheus.yml").read_text()
    config = config.replace("127.0.0.1:8082", server.addresses["metrics"].removeprefix("http://")).replace("15s", "1s")
    (tmp_path / "prometheus.yml").write_text(config)
    shutil.copy(MONITORING / "rules.yml", tmp_path)
    command = ["prometheus", "--config.file=prometheus.yml", f"--web.listen-address=127.0.0.1:{port}"]
    prometheus = subprocess.Popen([*command, "--storage.tsdb.path=data"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    pcm = (SAMPLES / "three-digits.wav").read_bytes()[44:]
    number = 0

    def missing() -> list[str]:
        nonlocal number
        number += 1
        assert post(server, SAMPLES / "pin.webm").ok
        headers = {"Content-Type": "application/octet-stream", "x-piece": "0", "x-last-piece": "true"}
        headers["ts_request_sequence_id"] = f"speaker-{number}"
        assert requests.post(server.live_url, data=pcm, headers=headers, timeout=300).ok
        found = []
        for expression in expressions():
            url = f"http://127.0.0.1:{port}/api/v1/query"
            answer = requests.get(url, params={"query": expression}, timeout=60).json()
            values = [float(sample["value"][1]) for sample in answer["data"]["result"]]
            if not values or any(value != value or value < 0 for value in values):
                found.append(expression)
        return found

    def shown() -> bool:
        try:  # Prometheus refuses connections, and then queries, until it has started
            ready = requests.get(f"http://127.0.0.1:{port}/-/ready", timeout=60).ok
        except requests.ConnectionError:
            ready = False
        return ready and not missing()

    try:
        wait_until(shown, "values in each panel")
    finally:
        prometheus.terminate()
        prometheus.wait()


KUBERNETES = ROOT / "deploy" / "kubernetes"
needs_kubectl = pytest.mark.skipif(
    not shutil.which("kubectl") or not importlib.util.find_spec("kubernetes_validate"),
    reason="needs kubectl and deploy/requirements.txt",
)


@pytest.fixture(params=["digits", "librispeech"])
def objects(request) -> list[dict]:
    """What an overlay gives to the cluster."""
    command = [
        "kubectl",
        "kustomize",
        "--load-restrictor",
        "LoadRestrictionsNone",
        KUBERNETES / "overlays" / request.param,
    ]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return list(yaml.safe_load_all(made.stdout))


def named(objects: list[dict], kind: str, name: str) -> dict:
    [found] = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def labels_match(selector: dict, template: dict) -> bool:
    return selector.items() <= template["metadata"]["labels"].items()


@needs_kubectl
def test_manifests_are_valid_and_fit_each_other(objects):
    import kubernetes_validate

    for each in objects:
        kubernetes_validate.validate(each, "1.37", strict=True)
    server = named(objects, "Deployment", "emformer-asr")["spec"]["template"]
    proxy = named(objects, "Deployment", "emformer-asr-proxy")["spec"]["template"]
    selected = {
        ("Service", "emformer-asr"): proxy,
        ("Service", "emformer-asr-pods"): server,
        ("PodDisruptionBudget", "emformer-asr"): server,
        ("PodDisruptionBudget", "emformer-asr-proxy"): proxy,
        ("NetworkPolicy", "emformer-asr"): server,
        ("NetworkPolicy", "emformer-asr-proxy"): proxy,
    }
    for (kind, name), template in selected.items():
        spec = named(objects, kind, name)["spec"]
        selector = spec.get("podSelector", spec.get("selector"))
        assert labels_match(selector.get("matchLabels", selector), template), (kind, name)
        assert not labels_match(selector.get("matchLabels", selector), proxy if template is server else server)
    [container] = server["spec"]["containers"]
    ports = {port["containerPort"] for port in container["ports"]}
    config = serve.read_config(ROOT / "config.properties")
    assert ports == {int(config[f"{name}_address"].rpartition(":")[2]) for name in ("inference", "metrics")}
    [metric] = named(objects, "HorizontalPodAutoscaler", "emformer-asr")["spec"]["metrics"]
    [rule] = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert rule["seriesQuery"].split("{")[0] in (ROOT / "metrics.yaml").read_text()
    files = named(objects, "ConfigMap", proxy["spec"]["volumes"][0]["configMap"]["name"])["data"]
    assert files["nginx.conf"] == (ROOT / "deploy" / "nginx.conf").read_text() and "proxy.sh" in files


@needs_kubectl
def test_the_pod_of_the_inference_service_is_valid():
    """KServe's own schema is nowhere to be had offline; what it hands on to Kubernetes is."""
    import kubernetes_validate

    service = yaml.safe_load((KUBERNETES / "kserve.yaml").read_text())
    spec = {name: value for name, value in service["spec"]["predictor"].items() if "Replicas" not in name}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": spec}
    kubernetes_validate.validate(pod, "1.37", strict=True)


@needs_nginx
def test_the_pieces_of_a_live_sequence_reach_one_pod_whichever_proxy_passes_them_on(tmp_path):
    """Three servers that say who they are, and two proxies before them."""

    class Pod(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = f"{self.server.server_port} {self.path}".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    pods = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pod) for _ in range(3)]
    servers = " ".join(f"server 127.0.0.1:{pod.server_port};" for pod in pods)
    environment = os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"}
    ports, proxies = free_ports(2), []
    try:
        for pod in pods:
            threading.Thread(target=pod.serve_forever, daemon=True).start()
        for port in ports:
            command = ["sh", KUBERNETES / "base" / "proxy.sh", ROOT / "deploy" / "nginx.conf", tmp_path / str(port)]
            command += [servers, "", f"127.0.0.1:{port}"]
            proxies.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))

        def answer(port: int, path: str, **headers: str) -> str:
            url = f"http://127.0.0.1:{port}/predictions/{path}"
            return requests.post(url, data=b"sound", headers=headers, timeout=60).text

        for port in ports:
            wait_until(lambda port=port: listens(port), "nginx")
        found = {}
        for sequence in map(str, range(30)):
            pieces = {answer(port, "emformer_asr_live", ts_request_sequence_id=sequence) for port in ports * 3}
            [found[sequence]] = pieces
        assert len(set(found.values())) == 3, "all pods have sequences"
        assert len({answer(ports[0], "emformer_asr") for _ in range(30)}) == 3, "files go to whoever is free"
    finally:
        for proxy in proxies:
            proxy.terminate()
            proxy.wait()
        for pod in pods:
            pod.shutdown()
            pod.server_close()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
