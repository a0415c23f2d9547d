"""The Grafana dashboard: what rules.yml records and metrics.yaml counts, as panels. Prints dashboard.json.

pip install -r deploy/requirements.txt
python deploy/monitoring/dashboard.py > deploy/monitoring/dashboard.json
"""

from grafana_foundation_sdk.builders import dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef

SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")  # which one, the viewer chooses
MEAN = "sum by (ModelName) (rate(asr_{0}_seconds_sum[5m])) / sum by (ModelName) (rate(asr_{0}_seconds_count[5m]))"
QUANTILE = "histogram_quantile({}, sum by (le, ModelName) (rate(asr_real_time_factor_bucket[5m])))"
# Title, unit, and expressions with their legends.
PANELS = [
    ("Audio transcribed in a second", "s", {"asr:audio:rate5m": "{{ModelName}} {{instance}}"}),
    ("Requests by outcome", "reqps", {"sum by (Outcome) (rate(asr_requests[5m]))": "{{Outcome}}"}),
    (
        "Real-time factor of a batch",
        "none",
        {
            "asr:real_time_factor:mean5m": "mean {{ModelName}}",
            QUANTILE.format(0.5): "median {{ModelName}}",
            QUANTILE.format(0.95): "p95 {{ModelName}}",
        },
    ),
    (
        "Time of a batch, by step",
        "s",
        {MEAN.format(step): f"{step} {{{{ModelName}}}}" for step in ("decode", "features", "engine", "handler")},
    ),
    ("Requests that wait for a worker", "none", {"asr:waiting:mean5m": "{{model_name}} {{instance}}"}),
    ("Time that a request waits", "s", {"asr:queue_seconds:mean5m": "{{model_name}} {{instance}}"}),
    ("Answers with 5xx", "percentunit", {"asr:server_errors:ratio5m": "{{instance}}"}),
    ("Live sequences of a worker", "none", {"asr_open_sequences": "{{instance}} {{Process}}"}),
    ("Workers started again within 15 minutes", "none", {"asr:worker_restarts:15m": "{{instance}}"}),
    (
        "Processor and memory in use",
        "percent",
        {"CPUUtilization": "processor {{instance}}", "MemoryUtilization": "memory {{instance}}"},
    ),
]


def main() -> None:
    board = dashboard.Dashboard("Emformer ASR").uid("emformer-asr").refresh("30s").time("now-3h", "now").readonly()
    board = board.with_variable(dashboard.DatasourceVariable("source").label("Prometheus").type("prometheus"))
    for title, unit, expressions in PANELS:
        panel = timeseries.Panel().title(title).unit(unit).min(0).height(8).span(12).datasource(SOURCE)
        for name, (expression, legend) in zip("ABCD", expressions.items(), strict=False):
            query = prometheus.Dataquery().ref_id(name).expr(expression).legend_format(legend).datasource(SOURCE)
            panel = panel.with_target(query)
        board = board.with_panel(panel)
    print(JSONEncoder(sort_keys=True, indent=2).encode(board.build()))


if __name__ == "__main__":
    main()
