import pytest

from pia_batch.config import PlacementConfig
from pia_batch.driver.preflight.cluster import check_ray
from pia_batch.driver.ray_address import check_address
from pia_batch.errors import ConfigError

WRONG = [
    *("6379", "head", "foo:bar:baz", "head:", ":6379", "head:0", "head:-1", "head:65536", "head:99999", "he ad:6379"),
    *("head:6379/", "::1:6379", "[::1]", "head:\N{ARABIC-INDIC DIGIT SIX}", "ray://head:99999", "ray://head:x"),
    *("ray://he ad:1", "\x1bhead:1x"),
]


@pytest.mark.parametrize("address", ["local", "auto", "head:6379", "10.0.0.1:65535", "[::1]:1", "ray://head:10001"])
def test_an_address_of_ray_is_accepted(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize("address", WRONG)
def test_any_other_address_is_refused_by_run_and_doctor_before_anything_connects(address: str) -> None:
    with pytest.raises(ConfigError, match=r"^placement\.ray_address or RAY_ADDRESS: invalid address .*; correct it"):
        check_address(address)
    (finding,) = check_ray(PlacementConfig(ray_address=address), lambda _: pytest.fail("it connected"))

    assert (finding.state, finding.subject) == ("fail", "ray")
    assert "expected HOST:PORT" in finding.message
    assert finding.message.isprintable()


@pytest.mark.parametrize(
    ("variable", "address"),
    [("", "local"), (" ", "local"), ("LOCAL", "local"), (" local ", "local"), ("Auto", "auto"), ("head:1\n", "head:1")],
)
def test_blanks_around_an_address_and_capital_letters_do_not_matter(
    monkeypatch: pytest.MonkeyPatch, variable: str, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", variable)

    assert PlacementConfig().address == address
