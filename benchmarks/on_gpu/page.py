"""The page of a run, in Markdown."""

from collections.abc import Sequence
from typing import Any

from on_gpu.device import MIB

Rows = list[list[str]]


def verdict(results: dict[str, Any]) -> str:
    """One line that says whether everything holds."""
    checks = [entry for section in ("exactness", "generation") for entry in results[section] if "passed" in entry]
    failed = sum(not entry["passed"] for entry in checks)
    left_out = sum(entry.get("left_out", 0) for section in ("exactness", "generation", "speed") for entry in results[section])
    state = f"{failed} of {len(checks)} checks FAILED" if failed else f"all {len(checks)} checks hold"
    errors = sum("error" in entry for entry in results["speed"])
    further = [f"{left_out} left out for lack of time"] * bool(left_out) + [f"{errors} measurements failed"] * bool(errors)
    return ", ".join([state, *further])


def exactness_rows(results: dict[str, Any]) -> Rows:
    """One row a family and data type: how many presses hold, the worst figure, what failed."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in results["exactness"]:
        if "family" in entry:
            groups.setdefault((entry["family"], entry["dtype"]), []).append(entry)
    rows = []
    for (family, dtype), entries in groups.items():
        worst = max((entry for entry in entries if "value" in entry), key=lambda entry: entry["value"], default=None)
        failed = [entry["press"] for entry in entries if not entry["passed"]]
        holds = f"{len(entries) - len(failed)} of {len(entries)}"
        rows.append([family, dtype, holds, _worst(worst), ", ".join(failed) or "-"])
    return rows


def _worst(entry: dict[str, Any] | None) -> str:
    return "-" if entry is None else f"{entry['value']:.2g} {entry['figure']} ({entry['press']})"


def generation_rows(results: dict[str, Any]) -> Rows:
    rows = []
    for entry in results["generation"]:
        if "check" in entry:
            outcome = (
                "holds" if entry.get("passed") else f"not checked: {entry['skipped']}" if "skipped" in entry else entry["error"]
            )
            rows.append([entry["check"], outcome])
    return rows


def decoding_rows(results: dict[str, Any]) -> Rows:
    bandwidth = next(entry["copy_gb_per_s"] for entry in results["speed"] if entry.get("kind") == "bandwidth")
    entries = [entry for entry in results["speed"] if entry.get("kind") == "decoding"]
    rows, reference = [], {}
    for entry in entries:
        place = (entry["batch"], entry["tokens"])
        start = [f"{entry['batch']} x {entry['tokens']:,}", entry["cache"]]
        if "error" in entry:
            rows.append([*start, entry["error"][:60], *["-"] * 8])
            continue
        reference.setdefault(place, entry["ms"])
        rows.append(
            [
                *start,
                f"{entry['ms']:.3f}",
                f"{reference[place] / entry['ms']:.2f}x",
                f"{entry['masked_ms']:.3f}",
                f"{entry['nbytes'] / MIB:.1f}",
                f"{entry['gb_per_s']:.0f}",
                f"{entry['gb_per_s'] / bandwidth:.0%}",
                _mib(entry["peak_bytes"]),
                _count(entry["launches"]),
                _waits(entry["synchronisations"]) + " / " + _waits(entry["masked_synchronisations"]),
            ]
        )
    return rows


def reading_rows(results: dict[str, Any]) -> Rows:
    rows, reference = [], {}
    for entry in results["speed"]:
        if entry.get("kind") != "reading":
            continue
        start = [f"{entry['tokens']:,}", entry["press"]]
        if "error" in entry:
            rows.append([*start, entry["error"][:60], *["-"] * 4])
            continue
        reference.setdefault(entry["tokens"], entry["ms"])
        over = f"{entry['ms'] / reference[entry['tokens']] - 1:+.1%}"
        kept, peak = f"{entry['nbytes'] / MIB:.1f}", _mib(entry["peak_bytes"])
        waits = _waits(entry["synchronisations"])
        rows.append([*start, f"{entry['ms']:.2f}", over, kept, peak, waits])
    return rows


def _mib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / MIB:.1f}"


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _waits(places: dict[str, int] | None) -> str:
    return "-" if places is None else str(sum(places.values()))


TABLES = (
    ("Exactness", ["family", "data type", "presses that hold", "worst", "failed"], exactness_rows),
    ("Generation", ["check", "outcome"], generation_rows),
    (
        "Decoding, per step",
        [
            "batch",
            "cache",
            "ms",
            "vs DynamicCache",
            "with a mask, ms",
            "KV MiB",
            "GB/s",
            "of copying",
            "peak MiB",
            "launches",
            "waits / with a mask",
        ],
        decoding_rows,
    ),
    (
        "Reading a context",
        ["tokens", "press", "ms", "over DynamicCache", "KV MiB", "peak MiB", "waits"],
        reading_rows,
    ),
)


def waiting_places(results: dict[str, Any]) -> Rows:
    """Lines that make the host wait, over all measurements."""
    places: dict[str, int] = {}
    for entry in results["speed"]:
        for name in ("synchronisations", "masked_synchronisations"):
            for place, count in (entry.get(name) or {}).items():
                places[place] = places.get(place, 0) + count
    return [[place, str(count)] for place, count in sorted(places.items(), key=lambda pair: -pair[1])]


def failures(results: dict[str, Any]) -> list[str]:
    found = []
    for section in ("exactness", "generation", "speed"):
        for entry in results[section]:
            if "error" in entry or entry.get("passed") is False:
                what = [
                    str(entry[name])
                    for name in ("family", "dtype", "press", "check", "kind", "cache", "tokens")
                    if name in entry
                ]
                figure = entry.get("error") or f"{entry['figure']} {entry['value']:.3g}"
                found.append(f"{section}: {', '.join(what)}: {figure}")
    return found


def markdown(results: dict[str, Any]) -> str:
    """The whole page."""
    environment = results["environment"]
    bandwidth = next(entry["copy_gb_per_s"] for entry in results["speed"] if entry.get("kind") == "bandwidth")
    lines = [
        f"# PiKV on {environment.get('name', environment['device'])}",
        "",
        f"**{verdict(results)}.** {results['seconds']:.0f} s, {results['started']}.",
        "",
        f"Copying on the device: {bandwidth:,.0f} GB/s. Waits are synchronisations of the host with the device.",
        "",
    ]
    for title, header, rows_of in TABLES:
        lines += [f"## {title}", "", *_table(header, rows_of(results)), ""]
    if waits := waiting_places(results):
        lines += ["## Lines that make the host wait", "", *_table(["line", "times"], waits), ""]
    if failed := failures(results):
        lines += ["## What failed", "", *[f"- {line}" for line in failed], ""]
    lines += ["## Environment", "", *_table(["", ""], [[name, str(value)] for name, value in environment.items()]), ""]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Rows) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(header), line(["---"] * len(header)), *map(line, rows)]
