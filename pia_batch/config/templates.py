"""Templates and times of runs: placeholders, run dates, backfills and deadlines; all UTC.

A *template* is a text with `{date}`, `{hour}`, or the name of a parameter in braces; `{{` and `}}` mean braces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from string import Formatter

from pia_batch.errors import ConfigError

_FORMATS = {"date": "%Y-%m-%d", "hour": "%H"}
"""Placeholders of a run date, with their default formats."""

_DIRECTIVES = {"Y", "y", "m", "d", "j", "G", "V", "u", "H", "%"}
"""Directives of strftime that are allowed: numbers of dates and hours, which are equal on every machine."""

_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, order=True)
class RunDate:
    """Day or hour that a run processes."""

    begins: datetime
    """Start, UTC: a whole day or a whole hour."""
    hourly: bool

    @classmethod
    def parse(cls, text: str) -> RunDate:
        """Return a run date from its text: `2026-11-22` or `2026-11-22T05`.

        Raises:
            ValueError: anything else.
        """
        if re.fullmatch(r"\d{4}-\d\d-\d\d(T\d\d)?", text, re.ASCII):
            try:
                return cls(datetime.fromisoformat(text).replace(tzinfo=UTC), "T" in text)
            except ValueError:
                pass
        msg = f"must be a date such as 2026-11-22, or an hour such as 2026-11-22T05 (got {text!r})"
        raise ValueError(msg)

    @classmethod
    def last(cls, now: datetime, *, hourly: bool) -> RunDate:
        """Return the last hour, or the last day, that is over at `now`."""
        this = now.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        return cls(this - timedelta(hours=1), hourly) if hourly else cls(_midnight(this.date()) - _DAY, hourly)

    @property
    def next(self) -> RunDate:
        """Following hour or day."""
        return RunDate(self.begins + (timedelta(hours=1) if self.hourly else _DAY), self.hourly)

    def __str__(self) -> str:
        return f"{self.begins:%Y-%m-%dT%H}" if self.hourly else f"{self.begins:%Y-%m-%d}"


_DAY = timedelta(days=1)


class Templates:
    """Templates of one config, filled in together for one run date."""

    def __init__(self, texts: Mapping[str, str], params: Mapping[str, str]) -> None:
        """Parse the templates.

        Args:
            texts: Templates by config key; texts without placeholders are templates too.
            params: Values of further placeholders, by name.

        Raises:
            ConfigError: an unmatched brace, an unknown placeholder, or an unknown format.
        """
        self._params = params
        self._parts = {key: list(_parts(key, text, params)) for key, text in texts.items()}

    @property
    def used(self) -> frozenset[str]:
        """Names of all placeholders in use."""
        return frozenset(name for parts in self._parts.values() for _, name, _ in parts if name)

    @property
    def dated(self) -> bool:
        """True if a run date changes a template's text."""
        return not self.used.isdisjoint(_FORMATS)

    @property
    def hourly(self) -> bool:
        """True if the hour of the run date changes a template's text."""
        formats = [form for parts in self._parts.values() for _, name, form in parts if name in _FORMATS]
        return any("H" in _directives(form) for form in formats)

    def has_date(self, key: str) -> bool:
        """Return True if a run date changes the text of `key`."""
        return any(name in _FORMATS for _, name, _ in self._parts[key])

    def fill(self, run_date: RunDate | None) -> dict[str, str]:
        """Return the filled-in texts by key. `run_date` may be None if the templates are not `dated`."""
        return {key: "".join(self._texts(parts, run_date)) for key, parts in self._parts.items()}

    def _texts(self, parts: list[tuple[str, str, str]], run_date: RunDate | None) -> list[str]:
        texts = []
        for literal, name, form in parts:
            texts.append(literal)
            if name in _FORMATS and run_date is not None:
                texts.append(run_date.begins.strftime(form))
            elif name:
                texts.append(self._params[name])
        return texts

    def date(self, text: str | None, now: datetime) -> RunDate | None:
        """Return the date of a run: the given one, or the last that is over at `now`; None if not `dated`.

        Raises:
            ConfigError: the date lacks an hour or has one that is not used, is in the future, or is not used at all.
        """
        if text is None:
            return RunDate.last(now, hourly=self.hourly) if self.dated else None
        if not self.dated:
            msg = f"run_date {text}: neither manifest nor output nor run_id has {{date}} or {{hour}}; leave it out"
            raise ConfigError(msg)
        chosen = RunDate.parse(text)
        if chosen.hourly != self.hourly:
            having, wanted = ("have an hour", f"{text}T05") if self.hourly else ("have no {hour}", text[:10])
            msg = f"run_date {text}: the templates {having}; write {wanted}"
            raise ConfigError(msg)
        if chosen.begins > now:
            msg = f"run_date {text} is in the future: it is {now:%Y-%m-%dT%H:%M} UTC"
            raise ConfigError(msg)
        return chosen

    def dates(self, text: str, now: datetime) -> list[RunDate]:
        """Return the run dates of a backfill `FROM..TO`, both included. A day at either end means all its hours.

        Raises:
            ConfigError: the text has another form or the wrong order, is in the future, or the templates have no date.
        """
        try:
            first, last = (RunDate.parse(part) for part in text.split(".."))
        except ValueError:
            msg = f"--backfill {text}: expected FROM..TO, such as 2026-11-20..2026-11-22"
            raise ConfigError(msg) from None
        if not any(self.has_date(key) for key in ("manifest", "output")):
            msg = (
                f"--backfill {text}: neither manifest nor output has {{date}}, and every run would be the same; write "
                "it there, or leave --backfill out"
            )
            raise ConfigError(msg)
        if (first.hourly or last.hourly) and not self.hourly:
            msg = f"--backfill {text}: the templates have no {{hour}}; name days"
            raise ConfigError(msg)
        if self.hourly and not last.hourly:
            last = RunDate(last.begins + timedelta(hours=23), hourly=True)
        at, dates = RunDate(first.begins, self.hourly), []
        if at > last or last.begins > now:
            ended = f"ends in the future: it is {now:%Y-%m-%dT%H:%M} UTC"
            wrong = "ends before it begins; write the earlier date first" if at > last else ended
            msg = f"--backfill {text} {wrong}"
            raise ConfigError(msg)
        while at <= last:
            dates.append(at)
            at = at.next
        return dates


def _parts(key: str, text: str, params: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Return the text before each placeholder, its name and its format, in order; the last has text only."""
    try:
        found = list(Formatter().parse(text))
    except ValueError as err:
        msg = f"{key}: {text!r}: {err}; write {{{{ and }}}} for braces"
        raise ConfigError(msg) from None
    parts = []
    for literal, name, form, conversion in found:
        if name is None:
            parts.append((literal, "", ""))
            continue
        if (name not in _FORMATS and name not in params) or conversion:
            known = ", ".join(f"{{{each}}}" for each in [*_FORMATS, *params])
            shown = name + (f"!{conversion}" if conversion else "")
            msg = (
                f"{key}: nothing stands for {{{shown}}}; known: {known}. Give others by --param NAME=VALUE or in "
                "`params`; {{ and }} are braces"
            )
            raise ConfigError(msg)
        _check_format(key, name, form or "")
        parts.append((literal, name, form or _FORMATS.get(name, "")))
    return parts


def _check_format(key: str, name: str, form: str) -> None:
    if form and name not in _FORMATS:
        msg = f"{key}: {{{name}:{form}}}: only date and hour take a format"
        raise ConfigError(msg)
    unknown = [directive for directive in _directives(form) if directive not in _DIRECTIVES]
    if unknown or (form and not _directives(form)):
        known = " ".join(f"%{letter}" for letter in sorted(_DIRECTIVES))
        msg = f"{key}: {{{name}:{form}}} is no format; it may have {known} and other text, as in {{date:%Y/%m/%d}}"
        raise ConfigError(msg)


def _directives(form: str) -> list[str]:
    """Return the letters after percent signs; an empty one for a percent sign at the end."""
    return re.findall(r"%(.?)", form, re.DOTALL)


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)


def seconds_of(text: str) -> float:
    """Return a duration such as `12h` in seconds.

    Raises:
        ValueError: anything else.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        msg = f"must be a number with s, m, h or d, such as 12h or 7d (got {text!r})"
        raise ValueError(msg)
    return float(match[1]) * _SECONDS[match[2]]


def deadline(text: str, now: datetime) -> datetime:
    """Return the time at which a run must stop.

    `06:00` means the next such time (UTC), `5h` a time after `now`; an ISO time means itself.

    An ISO time without a zone is UTC.

    Raises:
        ValueError: anything else.
    """
    try:
        if _DURATION.fullmatch(text):
            return now + timedelta(seconds=seconds_of(text))
        if re.fullmatch(r"\d\d:\d\d", text, re.ASCII):
            at = datetime.combine(now.astimezone(UTC).date(), time.fromisoformat(text), UTC)
            return at if at > now else at + _DAY
        moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        msg = f"must be a time such as 06:00 or 2026-11-23T06:00, or a duration such as 5h (got {text!r})"
        raise ValueError(msg) from None
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
