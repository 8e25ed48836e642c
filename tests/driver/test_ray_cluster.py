"""Runs on a cluster of several nodes, all on this machine, with GPUs that exist in name only."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from inputs import requests_table
from node_engines import NodeEngineLoader, calls_of, loaded_engine
from places import PYTHONPATH
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pia_batch import tiny
from pia_batch.config import PlacementConfig, RunConfig
from pia_batch.driver import ray_cluster
from pia_batch.driver import run as driver_run
from pia_batch.driver.authentication import authentication
from pia_batch.driver.preflight.cluster import check_capacity
from pia_batch.errors import ConfigError, InterruptedRunError
from pia_batch.pipeline.actor import TASKS_IN_FLIGHT
from pia_batch.pipeline.engine_loader import EngineLoader
from pia_batch.planning.plan import make_plan
from pia_batch.schema.run_record import RunSummary
from pia_batch.storage.object_store import Store

pytestmark = pytest.mark.slow

MakeConfig = Callable[..., RunConfig]

STORE_BYTES = 80 * 2**20


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head without GPUs, open to everyone; every test adds the nodes that it needs."""
    head = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    path = {"env_vars": {"PYTHONPATH": PYTHONPATH}}  # fakes.py, and this module
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        started = Cluster(initialize_head=True, head_node_args=head)
        ray.init(address=started.address, log_to_driver=False, runtime_env=path)
        yield started
        ray.shutdown()
        started.shutdown()


def add_gpu(nodes: Cluster) -> Any:
    return nodes.add_node(num_cpus=1, num_gpus=1, object_store_memory=STORE_BYTES)


def run(config: RunConfig, folder: Path, crowd: int, events: Iterator[None]) -> tuple[RunSummary, list[dict[str, Any]]]:
    """A run beside which `events` goes on, a step about twice a second; its summary and results."""
    engine_id = make_plan(config).engine_ids["default"]
    loader = NodeEngineLoader(engine_id, folder, crowd)
    summary = driver_run.run(config, load_engines=loader, on_progress=lambda _: next(events, None))
    return summary, pq.read_table(f"{config.output}/results/{summary.run_id}").to_pylist()


@pytest.mark.long
def test_a_run_that_is_given_no_engine_says_so_and_leaves_nothing_of_ray_data_behind(
    nodes: Cluster, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    assert nodes.address

    with pytest.raises(
        InterruptedRunError, match="one engine needs 1 GPUs and 1 CPUs, and the cluster has 0 GPUs and 2 CPUs"
    ):
        driver_run.run(make_config(placement__num_gpus=1, placement__wait_s=2))

    assert "engines_awaited" in caplog.text
    # An executor that goes on waiting ends this process some time after ray.shutdown().
    assert not [thread.name for thread in threading.enumerate() if "Executor" in thread.name]


@pytest.mark.long
def test_a_node_that_joins_is_used_and_one_that_dies_with_a_batch_is_survived(
    nodes: Cluster, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        requests_table(40, format=["gif"] * 40),
        placement__num_gpus=1,
        placement__min_engines=2,
        placement__max_engines=3,
        placement__batch_size=2,
    )
    engines = tmp_path / "engines"
    engines.mkdir()
    gpus = [add_gpu(nodes), add_gpu(nodes)]

    def events() -> Iterator[None]:
        while len(list(engines.glob("*.engine"))) < 2:
            yield
        gpus.append(joined := add_gpu(nodes))  # the others wait for its engine
        while len(list(Path(config.output, "_journal").glob("*.parquet"))) < 4:
            yield
        (engines / f"{joined.node_id}.hold").touch()
        while not (engines / f"{joined.node_id}.held").exists():
            yield
        nodes.remove_node(joined, allow_graceful=False)

    summary, rows = run(config, engines, crowd=3, events=events())

    assert (summary.succeeded, summary.exit_code) == (40, 0)
    assert Counter(row["request_id"] for row in rows) == Counter({f"r{k:03d}": 1 for k in range(40)})
    assert len(list(Path(config.output, "animations").rglob("*.gif"))) == 40
    first, second, dead = (node.node_id for node in gpus)
    assert {row["device"] for row in rows} == {first, second, dead}
    begun_again = [row for row in rows if row["attempts"] > 1]
    assert 1 <= len(begun_again) <= 2 * config.placement.batch_size  # what was on the dead node, and nothing else
    assert {row["device"] for row in begun_again} <= {first, second}
    for node in gpus[:2]:
        nodes.remove_node(node)


@pytest.mark.long
def test_no_node_idles_while_requests_wait_although_another_is_slower(
    nodes: Cluster, make_config: MakeConfig, tmp_path: Path
) -> None:
    place = {"placement__num_gpus": 1, "placement__min_engines": 2, "placement__max_engines": 2}
    config = make_config(requests_table(96, format=["gif"] * 96), **place, placement__batch_size=2)
    fast, slow = add_gpu(nodes), add_gpu(nodes)
    seconds = {fast.node_id: 0.5, slow.node_id: 1.5}
    loader = NodeEngineLoader(make_plan(config).engine_ids["default"], tmp_path, crowd=2, seconds_on=seconds)

    summary = driver_run.run(config, load_engines=loader)

    calls = {node: calls_of(tmp_path, node) for node in seconds}
    busy = {node: seconds[node] * len(each) / (each[-1][1] - each[0][0]) for node, each in calls.items()}
    idle_at_the_end = max(each[-1][1] for each in calls.values()) - calls[fast.node_id][-1][1]
    assert summary.succeeded == 96
    assert {node: len(list(tmp_path.glob(f"{node}.engine"))) for node in seconds} == dict.fromkeys(seconds, 1)
    assert min(busy.values()) >= 0.6, busy  # 0.96 and more on idle cores
    assert idle_at_the_end <= (TASKS_IN_FLIGHT + 1) * seconds[slow.node_id] + 1
    for node in (fast, slow):
        nodes.remove_node(node)


@pytest.mark.long
@pytest.mark.s3
def test_engines_of_a_node_share_one_download_of_the_weights(
    nodes: Cluster, make_config: MakeConfig, tmp_path: Path, s3: str
) -> None:
    """Two nodes with a cache each: two workers of one, and one of the other, want the engine at the same time."""
    weights = Store(f"{s3}/tiny")
    for path in tiny.PATH.rglob("*"):
        if path.is_file():
            weights.create(path.relative_to(tiny.PATH).as_posix(), path.read_bytes())
    config = make_config(model__base=f"{s3}/tiny", model__dtype="float32")
    load, started = EngineLoader(config.all_models, "cpu", None), tmp_path / "started"
    started.mkdir()
    caches = [tmp_path / "cache-a", tmp_path / "cache-b"]
    pair = [nodes.add_node(num_cpus=2, env_vars={"PIA_BATCH_CACHE": str(cache)}) for cache in caches]
    try:
        on_nodes = [
            ray.remote(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)) for node in pair
        ]
        crowd = [on_nodes[0], on_nodes[0], on_nodes[1]]
        answers = [on_node(loaded_engine).remote(load, started, len(crowd)) for on_node in crowd]
        engine_ids, messages = zip(*ray.get(answers), strict=True)
    finally:
        for node in pair:
            nodes.remove_node(node)

    assert len(set(engine_ids)) == 1
    downloads = [sum(line.startswith("weights_fetched") for line in lines) for lines in messages]
    assert (downloads[0] + downloads[1], downloads[2]) == (1, 1)
    assert all(len(list(cache.glob("*/unet/*.safetensors"))) == 1 for cache in caches)


@pytest.mark.long
def test_a_cluster_without_authentication_is_refused_on_demand_and_reported_otherwise(
    nodes: Cluster, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    assert authentication(None) == authentication(nodes.address) == "none"
    with pytest.raises(ConfigError, match=r"without token authentication.*RAY_AUTH_MODE=token.*require_auth"):
        driver_run.run(make_config(placement__require_auth=True))

    with ray_cluster.connect(PlacementConfig()):
        pass

    assert "open_cluster_found" in caplog.text or nodes.address.startswith("127.")


@pytest.mark.long
def test_a_cluster_that_cannot_read_in_addition_to_its_engines_is_reported_before_it_is_used(
    nodes: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    place = PlacementConfig(ray_address=nodes.address, min_engines=64, max_engines=64)

    with ray_cluster.connect(place):
        (message,) = [record.getMessage() for record in caplog.records if "small_cluster_found" in record.getMessage()]
    (finding,) = check_capacity(place, num_gpus=0)

    assert "no CPU is left to read the manifest" in message
    assert (finding.state, finding.subject) == ("warn", "capacity")
    assert "no CPU is left to read the manifest" in finding.message
    assert "set placement.min_engines to" in finding.remedy
    with pytest.raises(ConfigError, match="Ray on this machine: no CPU is left"):
        ray_cluster._check_capacity(place, ours=True)
