"""References from the page to media, as a browser resolves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reported import (
    RUN,
)

from pia_batch.errors import ConfigError
from pia_batch.report.links import MediaLinks


def places(**changes: Any) -> MediaLinks:
    standard = {"output": "s3://bucket/out", "page": f"s3://bucket/out/_runs/{RUN}/report.html"}
    standard |= {"folder": "s3://bucket/sets/a", "media_url": None, "images_config": {}}
    return MediaLinks(**standard | changes)


LOCAL = {"output": "file:///d/my%20out", "page": "file:///d/my%20out/_runs/r/report.html", "folder": "file:///d/in"}


@pytest.mark.parametrize(
    ("image", "reference", "where"),
    [
        ("cat.png", "../../../sets/a/cat.png", {}),
        ("s3://bucket/photos/a b#c?d%25:.png", "../../../photos/a%20b%23c%3Fd%2525%3A.png", {}),
        ("s3a://bucket/out/x.png", "../../x.png", {}),
        ("s3://elsewhere/cat.png", None, {}),
        ("s3://elsewhere/cat.png", None, {"images_config": {"allow": ["s3://elsewhere"]}}),
        ("file:///etc/passwd", None, {}),
        ("https://images.example.com/cat.png", None, {}),
        ("https://images.example.com/cat.png", "https://images.example.com/cat.png",
         {"images_config": {"allow": ["https://images.example.com/"]}}),
        ("javascript:alert(1)", "../../../sets/a/javascript%3Aalert%281%29", {}),
        ("data:text/html,x", "../../../sets/a/data%3Atext/html%2Cx", {}),
        ("a&b\"'<>.png", "../../../in/a%26b%22%27%3C%3E.png", LOCAL),
        ("/d/in/cat.png", "../../../in/cat.png", LOCAL),
        ("file:///d/in/c%20t.png", "../../../in/c%20t.png", LOCAL),
        ("cat.png", None, {"folder": ""}),
        (None, None, {}),
    ],
)  # fmt: skip
def test_a_condition_image_is_named_as_the_page_can_reach_it(
    image: str | None, reference: str | None, where: dict[str, Any]
) -> None:
    assert places(**where).image(image) == reference


SEGMENT = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1).filter(
    lambda text: text not in (".", "..")
)


@settings(deadline=None)  # a shared machine
@given(st.lists(SEGMENT, min_size=1, max_size=4), st.lists(SEGMENT, min_size=1, max_size=3))
def test_a_browser_resolves_a_reference_to_the_very_file(folder: list[str], name: list[str]) -> None:
    root, output = Path("/", *folder), Path("/", *folder[:-1], "out")
    page_uri = (output / "_runs" / "r" / "report.html").as_uri()
    local = MediaLinks(output.as_uri(), page_uri, root.as_uri(), None, {})

    reference = local.image("/".join(name))

    assert reference is not None
    assert unquote(urlsplit(urljoin(page_uri, reference)).path) == str(root.joinpath(*name))
    assert urljoin(page_uri, local.animation("ab" * 16, "mp4")) == output.as_uri() + f"/animations/ab/{'ab' * 16}.mp4"
    assert urljoin(page_uri, local.poster("ab" * 16)) == output.as_uri() + f"/animations/ab/{'ab' * 16}.jpg"


def test_a_page_elsewhere_needs_the_address_of_its_media(tmp_path: Path) -> None:
    page_uri = (tmp_path / "run.html").as_uri()
    with pytest.raises(ConfigError, match="leave out --out to store it there, or give the http address"):
        places(page=page_uri)
    with pytest.raises(ConfigError, match=r"invalid URL \(got ftp://host/out, expected the http or https address"):
        places(media_url="ftp://host/out")

    named = places(
        page=page_uri, media_url="https://site.example.com/out/", images_config={"allow": ["https://i.example.com/a/"]}
    )

    assert named.animation("ab" * 16, "gif") == f"https://site.example.com/out/animations/ab/{'ab' * 16}.gif"
    assert named.sources == {
        "img-src": "'self' data: https://site.example.com:443 https://i.example.com:443",
        "media-src": "'self' https://site.example.com:443",
    }


def test_a_comparison_is_linked_by_its_title_where_the_page_can_reach_it(tmp_path: Path) -> None:
    local = {"output": (tmp_path / "out").as_uri(), "page": (tmp_path / "out" / "_runs" / "r" / "report.html").as_uri()}
    (tmp_path / "javascript:x & y.html").write_text("<title>exact &amp; &lt;fast&gt;</title>")
    (tmp_path / "plain.html").write_text("no title")

    here = places(**local)

    named = here.linked_page(str(tmp_path / "javascript:x & y.html"))
    assert named == ("exact & <fast>", "../../../javascript%3Ax%20%26%20y.html")
    assert here.linked_page((tmp_path / "plain.html").as_uri()) == ("plain.html", "../../../plain.html")
    assert here.linked_page("https://site.example.com/a/fast.html") == (
        "fast.html",
        "https://site.example.com/a/fast.html",
    )
    with pytest.raises(ConfigError, match=r"none\.html does not exist; `pia-batch compare A B --out .*` writes it"):
        here.linked_page(str(tmp_path / "none.html"))
    with pytest.raises(ConfigError, match=r"cannot link to .*plain\.html; store both in one place, or give the http"):
        places().linked_page(str(tmp_path / "plain.html"))
