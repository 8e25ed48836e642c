"""Engine guard: hands requests to the engines of a worker, and makes sure that these are, and stay, the right ones.

An engine is accepted if its identity is the driver's and its self-test passes. Its work is watched, timed, and ended
with the process where it exceeds a limit of the config.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from pia_batch.config import RunConfig
from pia_batch.errors import ConfigError
from pia_batch.media import images
from pia_batch.pipeline.attempts import ExitCause
from pia_batch.pipeline.device_timer import DeviceTimer
from pia_batch.pipeline.engine_loader import Engine, LoadEngines
from pia_batch.pipeline.request_rows import attempt_key, condition_image
from pia_batch.pipeline.safety_guard import LoadChecker, SafetyGuard, load_checker
from pia_batch.pipeline.upscaler_loader import LoadUpscaler, load_upscaler
from pia_batch.pipeline.watchdog import Watchdog, deadline_s, memory_limit_bytes
from pia_batch.schema.columns import Row
from pia_batch.schema.declaration import declared
from pia_batch.schema.lora_scales import lora_scales
from pia_batch.schema.settings import EngineSettings

log = logging.getLogger(__name__)


class EngineGuard:
    """Checked, watched and timed access to the engines of this process. The first model is loaded at once.

    Args:
        load_engines: Function that gives the engines; called here, on the worker.
        engine_ids: Expected identity of each model's engine, which the keys were made with.
        config: Config of the run.
        report_exit: Function that receives the keys in work, and the cause, before the process is ended.
        exit_process: Function that ends this process.
        count: Function that adds to a counter of `metrics.METRICS`.
        load_checker: Function that gives the safety checker; called here too.
        load_upscaler: Function that gives the upscaler; called here too.

    Attributes:
        device: Name of the engines' device.
        safety: Safety checks of images and clips.
        upscaler: Network that enlarges frames, or None.

    Raises:
        ConfigError: An engine is not the expected one, takes all of `placement.memory_mb` without any request, or the
            safety checker or the upscaler cannot be loaded.
        BrokenDeviceError: The self-test of the engine failed.
    """

    def __init__(
        self,
        load_engines: LoadEngines,
        engine_ids: Mapping[str, str],
        config: RunConfig,
        report_exit: Callable[[list[str], ExitCause], None],
        exit_process: Callable[[], None],
        count: Callable[..., None],
        load_checker: LoadChecker = load_checker,
        load_upscaler: LoadUpscaler = load_upscaler,
    ) -> None:
        self._config, self._exit_process = config, exit_process
        self._engines, self._engine_ids = load_engines(), engine_ids
        self._checked: dict[str, weakref.ref[Engine]] = {}
        self.device = self._engine(next(iter(engine_ids))).device
        self.safety = SafetyGuard(config.safety, load_checker(config.safety, self.device))
        self.upscaler = load_upscaler(config, self.device)
        self.watchdog = Watchdog(report_exit, exit_process, memory_limit_bytes(config.placement.memory_mb))
        self.timer = DeviceTimer(self.device, count)

    def generate(self, rows: list[Row]) -> list[Any]:
        """Return a clip for each row, or None where the row has an error, which the check of its image may set."""
        with self.watch(rows):
            self.safety.check_inputs(rows)
        clips: list[Any] = [None] * len(rows)
        runnable = [index for index, row in enumerate(rows) if row["error_kind"] is None]
        for model in dict.fromkeys(rows[index]["model"] for index in runnable):
            engine = self._engine(model)
            chosen = [index for index in runnable if rows[index]["model"] == model]
            shots = [self._shot(engine, rows[index]) for index in chosen]
            with self.watch([rows[index] for index in chosen]), self.timer.generating():
                generated = engine.animate(shots)
            for index, clip in zip(chosen, generated, strict=True):
                clips[index] = clip
        return clips

    def watch(self, rows: list[Row]) -> AbstractContextManager[None]:
        """Watch the enclosed work on these rows."""
        return self.watchdog.watch([attempt_key(row) for row in rows], self.deadline_s(rows))

    def deadline_s(self, rows: list[Row]) -> float:
        """Return the seconds that these rows may take together."""
        return deadline_s(rows, self._config.limits.timeout_s)

    def exit_if_broken(self, rows: list[Row]) -> None:
        """End this process if an engine of these rows fails its self-test: then the requests are not the cause."""
        for model in dict.fromkeys(row["model"] for row in rows if row["error_kind"] is None):
            try:
                self._engine(model).check()
            except Exception:
                log.exception("device_broken device=%s", self.device)
                self._exit_process()

    def _engine(self, model: str) -> Engine:
        """Return the model's engine. One that was just loaded is checked first."""
        engine = self._engines.engine(model)
        known = self._checked.get(model)
        if known is None or known() is not engine:
            if engine.engine_id != self._engine_ids[model]:
                msg = (
                    f"model {model!r}: the weights on this node differ from the driver's (got engine "
                    f"{engine.engine_id}, expected {self._engine_ids[model]}); give every node the same weights, or "
                    "pin a hub commit by `revision`"
                )
                raise ConfigError(msg)
            engine.check()
            self._checked[model] = weakref.ref(engine)
        return engine

    def _shot(self, engine: Engine, row: Row) -> Any:  # the engine's own class
        settings = {name: row[name] for name in _SHOT_SETTINGS if row[name] is not None}
        if "motion_curve" in settings:
            settings["motion_curve"] = tuple(settings["motion_curve"])
        if "lora_scales" in settings:
            settings["lora_scales"] = lora_scales(settings["lora_scales"])
        if row["ip_adapter_bytes"] is not None:
            limits = self._config.images
            settings["ip_adapter_image"] = images.decode(
                row["ip_adapter_bytes"], max_pixels=limits.max_pixels, background=limits.background
            )
        return engine.shot(image=condition_image(row), prompt=row["prompt"], **settings)


_SHOT_SETTINGS = ("seed", "prompts", *(setting.name for setting in declared(EngineSettings)))
"""Settings of a row that the engine takes."""
