"""Hostile text in Chromium: shown, and never obeyed."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from report_visits import Site, Visit, build, inspected
from reported import (
    failure,
    result,
)

EVIL = "</script><script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'>"


def test_hostile_text_is_shown_and_never_obeyed(visit: Callable[..., Visit], tmp_path: Path) -> None:
    texts = [
        EVIL,
        "'; touch hurt; '",
        "END-OF-REQUEST\ntouch hurt",
        "\u202eevil\u2066\u200b",
        "{{ 7 * 7 }} ${hurt} %0a",
    ]
    rows = [result(k, request_id=f"id-{k} {text[:60]}".replace("\n", " "), prompt=text) for k, text in enumerate(texts)]
    rows += [failure(7, "non_finite", EVIL, prompt=EVIL, request_id=EVIL)]
    rows += [
        result(8, image="javascript:window.hurt=1"),
        result(9, image='x" onerror="window.hurt=1'),
        result(10, model=EVIL),
    ]
    prompts = [row["prompt"] for row in sorted(rows, key=lambda row: row["request_id"])]
    window = visit(1280, 3000, missing=True)  # two images are none
    page = window.open(build(tmp_path / "it's (mine)", rows).uri)

    assert page.locator("#grid .prompt bdi").all_text_contents() == prompts
    assert page.locator(".examples bdi").first.text_content() == EVIL
    for k, prompt in enumerate(prompts):
        page.locator("#grid button").nth(k).click()
        assert page.locator("#detail .prompt bdi").text_content() == prompt
        files = page.locator("#again").text_content().rpartition("\n")[0]
        assert not re.search("[\u200b\u202e\u2066]", files)
        subprocess.run(["bash", "-euc", files], cwd=tmp_path, check=True)
        assert json.loads((tmp_path / "again.jsonl").read_text())["prompt"] == prompt
        if page.locator("#inspect").count():
            assert inspected(page).is_file()
        page.keyboard.press("Escape")
    assert not (tmp_path / "hurt").exists()
    assert page.evaluate("window.hurt") is None


def test_the_policy_lets_no_other_script_or_markup_in(site: Site, visit: Callable[..., Visit]) -> None:
    window = visit()
    page = window.open(site.uri)
    attempt = """(code) => new Promise((done) => {
      addEventListener('securitypolicyviolation', (event) => done(event.effectiveDirective), { once: true });
      const element = (tag, settings) => document.body.appendChild(
        Object.assign(document.createElement(tag), settings));
      const attempts = {
        text: () => element('script', { text: 'window.hurt = 1' }),
        handler: () => document.body.setAttribute('onclick', 'window.hurt = 1'),
        markup: () => (document.body.innerHTML = '<b>hurt</b>'),
        link: () => element('a', { href: 'javascript:window.hurt = 1' }).click(),
        image: () => element('img', { src: 'https://example.com/x.png' }),
        film: () => element('video', { src: 'https://example.com/x.mp4' }),
        frame: () => element('iframe', { src: 'https://example.com/' }),
        form: () => element('form', { action: 'https://example.com/' }).submit(),
        style: () => document.body.setAttribute('style', 'color: red'),
        request: () => fetch('https://example.com/').catch(() => {}),
      };
      try { attempts[code](); } catch { /* told as a violation too */ }
    })"""
    directives = {
        **dict.fromkeys(("text", "handler", "markup"), "require-trusted-types-for"),
        "link": "script-src-elem", "image": "img-src", "film": "media-src", "frame": "frame-src", "form": "form-action",
        "style": "style-src-attr", "request": "connect-src",
    }  # fmt: skip
    assert {name: page.evaluate(attempt, name) for name in directives} == directives
    assert page.evaluate("window.hurt") is None
    assert page.locator("b").count() == 0
    window.told.clear()  # that is what was refused
