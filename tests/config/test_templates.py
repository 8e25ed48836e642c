"""Placeholders, run dates, backfills and deadlines."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pia_batch.config import RunConfig
from pia_batch.config import templates as schedule
from pia_batch.config.templates import RunDate, Templates
from pia_batch.errors import ConfigError

NOW = datetime(2026, 11, 23, 6, 40, 12, tzinfo=UTC)


def config(manifest: str = "s3://in/dt={date}/", output: str = "s3://out/{date}", **settings: Any) -> RunConfig:
    return RunConfig.load(None, {"manifest": manifest, "output": output, **settings})


def test_a_daily_template_means_yesterday_and_an_hourly_one_the_last_hour_that_is_over() -> None:
    daily = config().filled(NOW)
    hourly = config("in/{date}/{hour}", "out").filled(NOW)

    assert (daily.manifest, daily.output) == ("s3://in/dt=2026-11-22/", "s3://out/2026-11-22")
    assert (daily.run_date, daily.run_id) == ("2026-11-22", "2026-11-22")
    assert (hourly.manifest, hourly.run_date) == ("in/2026-11-23/05", "2026-11-23T05")


def test_a_run_date_formats_and_parameters_are_filled_in_together() -> None:
    filled = config(
        "s3://in/{country}/{date:%Y/%m/%d}/{hour}.parquet",
        "s3://out/{{literal}}/{country}",
        run_id="{date:%Y%m%d}{hour}-{country}",
        run_date="2026-11-22T07",
        params={"country": "de", "unused": "x"},
    ).filled(NOW)

    assert filled.manifest == "s3://in/de/2026/11/22/07.parquet"
    assert filled.output == "s3://out/{literal}/de"
    assert filled.run_id == "2026112207-de"


def test_a_dated_run_is_named_by_its_date_and_the_parameters_that_it_uses() -> None:
    filled = config("in/{shop}/{date}", params={"shop": "a/b c", "other": "x"}).filled(NOW)

    assert filled.run_id == "2026-11-22-a_b_c"


def test_without_placeholders_nothing_changes() -> None:
    plain = config("s3://in/all", "s3://out")

    assert plain.filled(NOW) == plain


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"manifest": "in/{dte}"}, r"manifest: nothing stands for {dte}; known: {date}, {hour}\."),
        ({"output": "{country}", "params": {"county": "x"}}, r"output: nothing stands for {country}; .*{county}"),
        ({"manifest": "in/{date"}, "manifest: .* write {{ and }} for braces"),
        ({"manifest": "in/}"}, "manifest: .* write {{ and }} for braces"),
        ({"manifest": "in/{}"}, "manifest: nothing stands for {}"),
        ({"manifest": "in/{date!r}"}, "nothing stands for {date!r}"),
        ({"manifest": "in/{date.year}"}, "nothing stands for {date.year}"),
        ({"manifest": "in/{date:%M}"}, r"{date:%M} is no format; it may have .*%Y"),
        ({"manifest": "in/{date:short}"}, "{date:short} is no format"),
        ({"manifest": "in/{date:%Y%}"}, "is no format"),
        ({"manifest": "in/{shop:%Y}", "params": {"shop": "a"}}, "only date and hour take a format"),
        ({"run_date": "2026-11-24"}, "run_date 2026-11-24 is in the future: it is 2026-11-23T06:40 UTC"),
        ({"run_date": "2026-11-22T05"}, "the templates have no {hour}"),
        ({"manifest": "{date}/{hour}", "run_date": "2026-11-22"}, "the templates have an hour; write 2026-11-22T05"),
        ({"manifest": "{date}/{hour}", "run_date": "2026-11-23T07"}, "in the future"),
        ({"manifest": "in", "output": "out", "run_date": "2026-11-22"}, "neither manifest nor output .* leave it out"),
        ({"run_date": "22.11.2026"}, "run_date: must be a date such as 2026-11-22, or an hour"),
        ({"run_date": "2026-02-30"}, "must be a date such as"),
        ({"params": {"date": "x"}}, "neither date nor hour"),
        ({"params": {"a-b": "x"}}, "letters, digits and '_'"),
        ({"params": {"a": ""}}, "not empty"),
        ({"params": {"a": "x\n"}}, "control characters"),
    ],
)
def test_a_mistake_in_a_template_is_told_with_its_key_and_the_remedy(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        config(**settings).filled(NOW)


def test_today_is_no_future_and_yaml_dates_are_dates(tmp_path: Any) -> None:
    (tmp_path / "run.yaml").write_text("manifest: in/{date}/{n}\noutput: out\nrun_date: 2026-11-23\nparams: {n: 7}\n")

    assert RunConfig.load(tmp_path / "run.yaml").filled(NOW).manifest == "in/2026-11-23/7"


DATES = st.datetimes(datetime(1970, 1, 2), datetime(2026, 11, 1)).map(  # noqa: DTZ001 - made aware below
    lambda moment: moment.replace(tzinfo=UTC, minute=0, second=0, microsecond=0)
)
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)


@given(
    st.lists(st.one_of(WORDS.map(lambda text: (text, None)), st.sampled_from([(None, "date"), (None, "hour")]))), DATES
)
def test_text_comes_back_as_it_was_and_placeholders_as_the_date(
    parts: list[tuple[str | None, str | None]], moment: datetime
) -> None:
    names = [name for _, name in parts]
    template = "".join(
        f"{{{name}}}" if name else str(text).replace("{", "{{").replace("}", "}}") for text, name in parts
    )
    values = {"date": moment.strftime("%Y-%m-%d"), "hour": moment.strftime("%H")}
    templates = Templates({"manifest": template}, {})

    filled = templates.fill(RunDate(moment, hourly=True))["manifest"]

    assert filled == "".join(values[name] if name else str(text) for text, name in parts)
    assert (templates.hourly, templates.dated) == ("hour" in names, bool(set(names) & set(values)))


@given(st.text(max_size=30))
def test_any_text_is_filled_in_or_refused_with_its_key(text: str) -> None:
    try:
        filled = Templates({"manifest": text}, {"shop": "north"}).fill(RunDate(NOW, hourly=True))["manifest"]
    except ConfigError as err:
        filled, told = None, str(err)
        assert told.startswith("manifest: ")

    assert ("{" in text or "}" in text) or filled == text


@given(DATES, st.booleans())
def test_run_dates_are_read_as_they_are_written_and_follow_each_other(moment: datetime, hourly: bool) -> None:
    day = moment if hourly else moment.replace(hour=0)
    date = RunDate(day, hourly)

    assert RunDate.parse(str(date)) == date
    assert RunDate.parse(str(date.next)) > date
    assert RunDate.last(date.next.begins, hourly=hourly) == date
    assert RunDate.last(date.next.begins + timedelta(minutes=59), hourly=hourly) == date


def test_a_backfill_has_every_date_between_its_ends_in_order() -> None:
    daily = config().templates
    hourly = config("in/{date:%Y%m%d%H}", "out").templates

    assert [str(date) for date in daily.dates("2026-10-30..2026-11-02", NOW)] == [
        "2026-10-30",
        "2026-10-31",
        "2026-11-01",
        "2026-11-02",
    ]
    assert [str(date) for date in hourly.dates("2026-11-22T23..2026-11-23T01", NOW)] == [
        "2026-11-22T23",
        "2026-11-23T00",
        "2026-11-23T01",
    ]
    assert len(hourly.dates("2026-11-20..2026-11-22", NOW)) == 72
    assert [str(date) for date in daily.dates("2026-11-23..2026-11-23", NOW)] == ["2026-11-23"]


@pytest.mark.parametrize(
    ("manifest", "text", "why"),
    [
        ("in/{date}", "2026-11-20", "expected FROM..TO, such as"),
        ("in/{date}", "2026-11-20..", "expected FROM..TO, such as"),
        ("in/{date}", "a..b..c", "expected FROM..TO, such as"),
        ("in/{date}", "2026-11-22..2026-11-20", "ends before it begins"),
        ("in/{date}", "2026-11-22..2026-11-24", "ends in the future"),
        ("in/{date}", "2026-11-20T01..2026-11-21", "no {hour}; name days"),
        ("in/{date}/{hour}", "2026-11-20..2026-11-23", "ends in the future"),  # that day has hours to come
        ("in", "2026-11-20..2026-11-22", "neither manifest nor output has {date}, and every run would be the same"),
    ],
)
def test_a_backfill_that_cannot_be_meant_is_refused(manifest: str, text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        config(manifest, "out", run_id="{date}").templates.dates(text, NOW)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("06:00", "2026-11-24T06:00"),  # the one of today is over
        ("07:30", "2026-11-23T07:30"),
        ("5h", "2026-11-23T11:40:12"),
        ("90m", "2026-11-23T08:10:12"),
        ("2026-11-24T06:00", "2026-11-24T06:00"),
        ("2026-11-24T06:00+02:00", "2026-11-24T04:00"),
        ("2026-11-24T06:00Z", "2026-11-24T06:00"),
    ],
)
def test_a_deadline_is_a_time_a_moment_or_a_duration(text: str, moment: str) -> None:
    assert schedule.deadline(text, NOW) == datetime.fromisoformat(moment).replace(tzinfo=UTC)
    assert schedule.deadline(text, NOW.astimezone(timezone(timedelta(hours=-11)))) == schedule.deadline(text, NOW)


@pytest.mark.parametrize("text", ["6:00", "24:00", "tonight", "5", "-5h", "", "999999999d", "2026-13-01"])
def test_what_is_no_deadline_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be a time such as 06:00 .*, or a duration such as 5h \(got"):
        schedule.deadline(text, NOW)
    with pytest.raises(ConfigError, match=r"budget\.deadline"):
        config(**{"budget.deadline": text})


def test_a_time_needs_no_quotes_in_yaml(tmp_path: Any) -> None:
    (tmp_path / "run.yaml").write_text("manifest: in\noutput: out\nbudget: {deadline: 06:00}\n")

    assert RunConfig.load(tmp_path / "run.yaml").budget.deadline == "06:00"
