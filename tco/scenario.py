"""A scenario: what is asked, and the columns that could answer it, every figure with what it rests on.

Read from YAML. What the file says of a column by hand wins, then its `figures` for all columns, then what was measured and
published (report, counters, policy, profile, price table), then the column that this one is like, then the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from edgeft.errors import UsageError, unknown
from edgeft.tco import evidence
from edgeft.tco.cells import ASSUMED
from edgeft.tco.figures import Figure
from edgeft.tco.inputs import API, INPUTS, KINDS, MACHINES, ROUTED, inputs_of
from edgeft.tco.measured import Measured, api_models, choose, load_report
from edgeft.tco.written import known, number, written

SCHEMA = "edgeft/scenario@1"
TOP = ("schema", "name", "about", "date", "report", "artifact", "figures", "columns", "compare")
COLUMN = ("kind", "title", "about", "like", "model", "batch", "profile", "report", "artifact", "local", "remote", "policy", "counters",
          "figures")  # fmt: skip


@dataclass(frozen=True)
class Column:
    """One column of the table."""

    id: str
    kind: str
    title: str
    figures: dict[str, Figure]  # by the formulas' names
    parts: dict[str, str] = field(default_factory=dict)  # local, remote -> id of a column
    batch: bool = False
    quality_of: str | None = None  # 'report, artefact' of its quality: columns of the same are paired


@dataclass(frozen=True)
class Scenario:
    """What `tabulate` needs."""

    name: str
    about: str
    date: date
    figures: dict[str, Figure]
    columns: dict[str, Column]
    local: str | None = None  # the columns that are held against each other; None: the cheapest of each side
    rival: str | None = None
    pairs: dict[str, Any] = field(default_factory=dict)  # 'report#a|report#b' -> b against a on the same rows


def read_scenario(
    path: Path,
    changed: Mapping[str, float] | None = None,
    report: tuple[Path | None, str | None] = (None, None),
) -> Scenario:
    """Read a file. `report` (folder, artefact) takes the place of the file's own. Raises UsageError that names the file, the key
    and what is allowed."""
    import yaml

    if not path.is_file():
        raise UsageError(f"there is no file {path}.", f"edgeft tco init {path}")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}", f"edit {path}") from None
    if isinstance(value, dict):
        if report[0] is not None:
            value["report"] = str(report[0].resolve())
        if report[1] is not None:
            value["artifact"] = report[1]
    return build(value, str(path), path.parent, changed or {})


def build(value: Any, where: str, folder: Path, changed: Mapping[str, float]) -> Scenario:
    """A scenario from parsed YAML; `changed` (NAME or COLUMN.NAME) wins over everything. Raises UsageError."""
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        seen = value.get("schema") if isinstance(value, dict) else type(value).__name__
        raise UsageError(
            f"{where} is no scenario: its schema is {seen!r}, not '{SCHEMA}'.", "edgeft tco init"
        )
    known(value, TOP, "the key", where)
    columns = value.get("columns")
    if not isinstance(columns, dict) or not columns:
        raise UsageError(f"{where} has no columns.", "edgeft tco init scenario.yaml shows some")
    today = value.get("date") or date.today()
    if not isinstance(today, date):
        raise UsageError(f"'date' in {where} is {today!r}, not a date.", "date: 2026-11-25")
    reader = Reader(where, folder, today, dict(value.get("figures") or {}), dict(changed))
    reader.report = (value.get("report"), value.get("artifact"))
    made = {str(name): reader.column(str(name), spec, columns) for name, spec in columns.items()}
    shared = reader.shared()
    reader.all_used(made, shared)
    compare = value.get("compare") or {}
    for side in ("local", "rival"):
        if compare.get(side) and compare[side] not in made:
            raise unknown(f"compare.{side} in {where}: the column", compare[side], made, f"edit {where}")
    return Scenario(
        str(value.get("name") or Path(where).stem), str(value.get("about") or "").strip(), today, shared, made,
        compare.get("local"), compare.get("rival"), reader.pairs(),
    )  # fmt: skip


@dataclass
class Reader:
    """One reading of a scenario: what it says of the whole, and what was changed from outside."""

    where: str
    folder: Path
    today: date
    whole: dict[str, Any]  # the scenario's own figures, as written
    changed: dict[str, float]
    report: tuple[str | None, str | None] = (None, None)
    reports: dict[str, Any] = field(default_factory=dict)
    done: dict[str, Column] = field(default_factory=dict)

    def shared(self) -> dict[str, Figure]:
        """The figures that belong to the scenario and to no column."""
        return {name: self._resolve("", name, {}, {}) for name, i in INPUTS.items() if not i.kinds}

    def column(self, name: str, spec: Any, every: Mapping[str, Any]) -> Column:
        """One column with all figures of its kind."""
        if name in self.done:
            return self.done[name]
        if not isinstance(spec, dict):
            raise UsageError(
                f"the column '{name}' in {self.where} is no map of keys.", "edgeft tco init shows one"
            )
        known(spec, COLUMN, f"columns.{name}: the key", self.where)
        base = self._named(name, spec, "like", every) if spec.get("like") else None
        if base and spec.get("batch"):
            spec = {"model": every[base.id].get("model"), **spec}
        kind = spec.get("kind") or (base.kind if base else None)
        if kind not in KINDS:
            raise unknown(f"columns.{name}: the kind", str(kind), KINDS, f"edit {self.where}")
        figures = dict(spec.get("figures") or {})
        known(figures, tuple(inputs_of(kind)), f"columns.{name}.figures: the figure", self.where)
        found, quality_of = self._evidence(name, kind, spec)
        parts = {}
        if kind == ROUTED:
            for part in ("local", "remote"):
                other = self._named(name, spec, part, every)
                if (other.kind == API) != (part == "remote") or other.kind == ROUTED:
                    raise UsageError(
                        f"columns.{name}.{part} in {self.where} is '{other.id}', a column of kind {other.kind}.",
                        f"{part}: a column of kind {'api' if part == 'remote' else 'own, fleet or cloud'}",
                    )
                parts[part] = other.id
        like = dict(base.figures) if base else {}
        if base and spec.get("batch"):
            like = {
                k: f for k, f in like.items() if not k.startswith(("usd_per_mtok", "long_context", "ttft"))
            }
        resolved = {n: self._resolve(name, n, figures, {**like, **found}) for n in inputs_of(kind)}
        title = str(spec.get("title") or name)
        quality_of = quality_of or (base.quality_of if base else None)
        made = Column(name, kind, title, resolved, parts, bool(spec.get("batch")), quality_of)
        self.done[name] = made
        return made

    def _named(self, name: str, spec: Mapping[str, Any], key: str, every: Mapping[str, Any]) -> Column:
        wanted = str(spec.get(key))
        if wanted not in every or wanted == name:
            raise unknown(
                f"columns.{name}.{key}: the column",
                str(wanted),
                [k for k in every if k != name],
                f"edit {self.where}",
            )
        if wanted not in self.done and list(every).index(wanted) > list(every).index(name):
            raise UsageError(
                f"columns.{name} in {self.where} names '{wanted}', which stands below it.",
                "put it below that one",
            )
        return self.column(str(wanted), every[wanted], every)

    def _resolve(self, column: str, name: str, own: Mapping[str, Any], found: Mapping[str, Figure]) -> Figure:
        """The figure that wins."""
        i, key = INPUTS[name], f"{column}.{name}" if column else name
        given: Any = None
        beside = found.get(name)  # a column that this one is like may have a figure of its own
        if column and name in own:
            figure = written(key, name, own[name], self.where, self.today)
        elif name in self.whole and not (beside and beside.id.split(".")[0] in self.done):
            figure = written(name, name, self.whole[name], self.where, self.today)
        elif beside:
            figure = beside
        else:
            text = "assumed by default" if i.default is not None else f"no {name}"
            figure = Figure(key if i.kinds and i.range else name, i.default, i.range, ASSUMED, text, i.bounds)
        for asked in (key, name):
            if given is None and asked in self.changed:
                given = self.changed[asked]
                value = number(given, f"--set {asked}", "the command", i)
                figure = Figure(asked, value, None, ASSUMED, "set on the command line", i.bounds)
        return figure

    def _evidence(
        self, name: str, kind: str, spec: Mapping[str, Any]
    ) -> tuple[dict[str, Figure], str | None]:
        """(figures that were measured or published, what its quality was measured on)."""
        found: dict[str, Figure] = {}
        quality_of = None
        place, artifact = spec.get("report") or self.report[0], spec.get("artifact") or self.report[1]
        report = self._report(place) if place else None
        measured = choose(report, artifact) if report and kind != ROUTED else None
        owner = name if spec.get("report") or spec.get("artifact") else ""
        if measured:
            found |= evidence.workload_of(owner, measured)
        if kind == API and spec.get("model"):
            there = api_models(report).get(spec["model"].removeprefix("litellm:")) if report else None
            found |= self._model(name, spec, there)
            if there:
                found |= evidence.rival_of(name, there)
                quality_of = f"{place}#{there.id}" if there.correct_share is not None else None
        if kind in MACHINES:
            from edgeft.tco.box import profile_of

            box = profile_of(spec["profile"]) if spec.get("profile") else None
            if box:
                found |= evidence.profile_of(name, box)
            if measured and report:
                found |= evidence.machine_of(name, measured, report, box)
                quality_of = f"{place}#{measured.id}" if measured.correct_share is not None else None
        if kind == ROUTED:
            if spec.get("policy"):
                found |= evidence.policy_of(name, self.folder / spec["policy"])
            if place := spec.get("counters"):
                web = str(place).startswith(("http://", "https://"))
                found |= evidence.counters_of(
                    name, str(place) if web else str(self.folder / place), spec.get("artifact")
                )
        return {k: f for k, f in found.items() if k in inputs_of(kind)}, quality_of

    def _model(self, name: str, spec: Mapping[str, Any], there: Measured | None) -> dict[str, Figure]:
        from edgeft.tco.prices import list_price, price_table

        batch = bool(spec.get("batch"))
        if there and there.price and not batch:
            return evidence.price_of(name, there.price)
        return evidence.price_of(
            name, list_price(spec["model"], *price_table(), batch=batch, today=self.today)
        )

    def _report(self, place: str) -> Any:
        if place not in self.reports:
            self.reports[place] = load_report(self.folder / place)
        return self.reports[place]

    def pairs(self) -> dict[str, Any]:
        """Paired comparisons of a report's models, both ways round: 'column's quality|rival's quality' -> column less rival."""
        found = {}
        for place, report in self.reports.items():
            for pair in report.pairs:
                a, b, (low, high) = pair["a"], pair["b"], pair["points_ci95"]
                found[f"{place}#{b}|{place}#{a}"] = pair
                found[f"{place}#{a}|{place}#{b}"] = {
                    **pair,
                    "points": -pair["points"],
                    "points_ci95": [-high, -low],
                }
        return found

    def all_used(self, columns: Mapping[str, Column], shared: Mapping[str, Figure]) -> None:
        """Every figure of the scenario and of the command must be one that something reads."""
        known(self.whole, tuple(INPUTS), "the figure", self.where)
        for name in self.whole:
            if INPUTS[name].own_only:
                raise UsageError(
                    f"'{name}' in {self.where} belongs to a column: an API that is used as it is has none.",
                    f"columns: a column: figures: {name}",
                )
        names = {*INPUTS, *(f"{c.id}.{n}" for c in columns.values() for n in c.figures)}
        for name in self.changed:
            if name not in names:
                raise unknown(
                    "the figure", name, names, "edgeft tco SCENARIO.yaml --set requests_per_month=500000"
                )
