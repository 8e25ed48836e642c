import pytest

from pia_batch.config import RunConfig
from pia_batch.errors import ConfigError
from pia_batch.mistakes import nearest


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("placement.batchsize", "placement.batch_size"),
        ("placment", "placement"),
        ("modle", "model"),
        ("fps", "defaults.fps"),
        ("batch_size", "placement.batch_size"),
        ("defaults.batch_size", "placement.batch_size"),
        ("model.fps", "defaults.fps"),
        ("limits.max_fail", "limits.max_failed"),
        ("model.loras.0.scal", "model.loras.0.scale"),
        ("models.anime.bse", "models.anime.base"),
        ("models.anime.scheduler.nmae", "models.anime.scheduler.name"),
        ("model.ip_adapter.sorce", "model.ip_adapter.source"),
        ("zebra", None),
        ("", None),
        ("model..", "model"),
    ],
)
def test_the_key_that_was_meant_is_found(typed: str, meant: str | None) -> None:
    assert nearest(typed.split("."), RunConfig) == meant


def test_every_mistake_of_a_config_is_told_at_once_and_without_secrets() -> None:
    wrong = {
        "manifest": "m",
        "placement.batchsize": 2,
        "defaults.width": 65,
        "images.allow": ["ftp://user:hunter2@host/"],
        "model.loras": [{"source": "s3://key:hunter2@bucket/x", "scal": 1, "scale": 99}],
    }
    with pytest.raises(ConfigError) as told:
        RunConfig.load(None, wrong)

    text = str(told.value)
    assert text.startswith("command line: ")
    assert "placement.batchsize: unknown key; did you mean 'placement.batch_size'?" in text
    assert "output: required, and not given" in text
    assert "defaults.width: Input should be a multiple of 8 (got 65)" in text
    assert "model.loras.0.scal: unknown key; did you mean 'model.loras.0.scale'?" in text
    assert "hunter2" not in text
