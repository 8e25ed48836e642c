"""What Prometheus gets of a real run, and what the dashboard asks it for."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import local_ray
import pytest
from fakes import FakeEngineLoader
from inputs import requests_table
from servers import free_port

from pia_batch.config import RunConfig
from pia_batch.driver.progress import Progress
from pia_batch.driver.run import run
from pia_batch.pipeline.metrics import METRICS
from pia_batch.planning.plan import make_plan
from pia_batch.schema.run_record import ProgressSnapshot
from pia_batch.storage.object_store import Store

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "jobs" / "grafana" / "pia-batch.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


@pytest.fixture
def metrics_port() -> Iterator[int]:
    """The port of a Ray of our own that sends its metrics every half second instead of every ten."""
    port = free_port()
    with local_ray.started(num_cpus=3, _metrics_export_port=port, _system_config={"metrics_report_interval_ms": 500}):
        yield port


@pytest.mark.long
@pytest.mark.slow
def test_a_run_can_be_scraped(metrics_port: int, make_config: Callable[..., RunConfig]) -> None:
    prompts = ["fine", "fine", "not finite"] * 4
    config = make_config(requests_table(12, prompt=prompts, format=["gif"] * 12), placement__batch_size=2)
    loader = FakeEngineLoader(make_plan(config).engine_ids["default"], seconds=1.0)
    seen: dict[str, float] = {}

    def scrape(progress: Progress) -> None:
        if progress.done < progress.total:  # the engine's process, and what it counted, end with the last one
            seen.update(scraped(metrics_port))

    summary = run(config, on_progress=scrape, load_engines=loader)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not seen:
        seen.update(scraped(metrics_port))

    assert summary.computed == 12
    about = json.loads(Store(config.output).read(f"_runs/{summary.run_id}/run.json"))
    reported = ProgressSnapshot.model_validate(about["progress"])
    assert (reported.phase, reported.done, reported.failures) == ("finished", 12, {"non_finite": 4})
    assert reported.newest is not None
    assert reported.newest.endswith(".gif")
    assert 0.1 < (reported.busy or 0.0) <= 1  # six batches of a second each, and the start
    assert {re.sub(r"\{.*", "", name) for name in seen} == {f"ray_{name}" for name in METRICS}
    assert 0 < seen['ray_pia_batch_requests_total{error_kind="",status="succeeded"}'] <= 8
    assert 0 < seen['ray_pia_batch_requests_total{error_kind="non_finite",status="failed"}'] <= 4
    assert seen['ray_pia_batch_stage_seconds_total{stage="generate"}'] >= 1.0
    assert seen['ray_pia_batch_slots_total{state="filled"}'] % 2 == 0
    assert seen['ray_pia_batch_requests{state="done"}'] + seen['ray_pia_batch_requests{state="left"}'] == 12


def scraped(port: int) -> dict[str, float]:
    """Our metrics with their own tags, by what Prometheus would call them."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:  # not up yet
        return {}
    ours = (re.fullmatch(r"(ray_pia_batch_\w+)\{(.*)\} (\S+)", line) for line in lines)
    return {
        f"{found[1]}{{{','.join(sorted(tag for tag in _TAG.findall(found[2])))}}}": float(found[3])
        for found in ours
        if found
    }


_TAG = re.compile(r'(?:status|error_kind|stage|state)="[^"]*"')


@pytest.mark.parametrize("query", QUERIES)
def test_the_dashboard_asks_for_metrics_and_tags_that_exist(query: str) -> None:
    asked = re.findall(r"ray_(\w+)\{([^}]*)\}", query)
    assert asked
    for name, tags in asked:
        used = set(re.findall(r"(\w+)=", tags)) - {"SessionName"}  # Ray's own
        assert used <= set(METRICS[name].tags)
    grouped = {tag for tags in re.findall(r"by \(([^)]*)\)", query) for tag in tags.split(", ")} - {"WorkerId"}
    assert grouped <= {tag for name, _ in asked for tag in METRICS[name].tags}


def test_every_metric_is_shown_and_explained() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    for name, metric in METRICS.items():
        tags = ", ".join(f"`{tag}`" for tag in metric.tags)
        assert f"| `{name}` | {metric.kind} | {tags} | {metric.meaning} |" in page
        assert any(f"ray_{name}{{" in query for query in QUERIES)
