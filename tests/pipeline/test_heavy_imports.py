"""Imports of the driver and of an engine's worker, on which the time to the first batch depends."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from pia_batch.pipeline.heavy_imports import garbage_collection_paused

NOT_NEEDED = ("cv2", "IPython", "matplotlib", "onnx", "sklearn", "tensorboard", "torchvision")
"""Libraries that some dependency imports where they are installed, unless one takes care."""


@pytest.mark.long
@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("pia_batch.driver.run", ("torch", "diffusers", "transformers", "tokenizers", "peft", "scipy", *NOT_NEEDED)),
        ("pia_batch.engine.model_cache", ("ray", "pandas", "av", *NOT_NEEDED)),
    ],
)
def test_a_process_imports_no_library_that_it_does_not_need(module: str, forbidden: tuple[str, ...]) -> None:
    script = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*{*sys.argv[2:]} & {*sys.modules})"

    done = subprocess.run(
        [sys.executable, "-c", script, module, *forbidden], capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == []


def test_garbage_collection_is_as_it_was_after_imports_and_after_an_error() -> None:
    assert gc.isenabled()
    with garbage_collection_paused():
        assert not gc.isenabled()
        with garbage_collection_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), garbage_collection_paused():
        raise ImportError
    assert gc.isenabled()
