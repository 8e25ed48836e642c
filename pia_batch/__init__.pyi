from pia_batch.config import ModelConfig as ModelConfig
from pia_batch.config import RunConfig as RunConfig
from pia_batch.datasets.export import export as export
from pia_batch.datasets.prepare import prepare as prepare
from pia_batch.driver.run import run as run
from pia_batch.engine import PiaEngine as PiaEngine
from pia_batch.engine import Shot as Shot
from pia_batch.evaluation.job import evaluate as evaluate
from pia_batch.pipeline.dataset import animate as animate
from pia_batch.planning.plan import make_plan as plan

__all__ = [
    "ModelConfig",
    "PiaEngine",
    "RunConfig",
    "Shot",
    "__version__",
    "animate",
    "evaluate",
    "export",
    "plan",
    "prepare",
    "run",
]
__version__: str
