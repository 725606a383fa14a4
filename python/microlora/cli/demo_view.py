"""The demo's result in the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from microlora.progress import Progress as Tell

__all__ = ["progress_bar", "show_answer", "show_run"]

_BAR = 40


@contextlib.contextmanager
def progress_bar() -> Iterator[Tell]:
    """A bar on standard error that follows a `microlora.progress.Progress` callback and then vanishes."""
    columns = (TextColumn("{task.description:<32}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def tell(done: int, total: int | None, message: str) -> None:
            bar.update(task, completed=done, total=total, description=escape(message))

        yield tell


def _signed(value: float | None) -> Text:
    if value is None:
        return Text("-")
    return Text(f"{value:+.3f}", style="green" if value > 0 else "red" if value < 0 else "")


def _plain(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.3f}"


def _micros(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _headline(console: Console, result: dict[str, Any]) -> None:
    encoder = result["encoder"]
    source = "read from the cache" if encoder["from_cache"] else f"fitted in {encoder['seconds']:.1f} s"
    console.print(
        f"Code search in the standard library of Python {result['python']}: {result['pairs']:,} functions; "
        f"encoder {escape(encoder['name'])}, {encoder['dim']} dimensions, {source}; "
        f"rank {result['rank']}, seed {result['seed']}."
    )


def _table(title: str) -> Table:
    return Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", padding=(0, 1, 0, 0)
    )


def _personas(result: dict[str, Any]) -> Table:
    table = _table("MRR@10 of held-out queries; microseconds per click (p50, p99)")
    table.add_column("persona", no_wrap=True)
    for name in ("clicks", "before", "at 10", "all", "change", "others", "p50", "p99"):
        table.add_column(name, justify="right", no_wrap=True)
    overall = result["overall"]
    for row in [*result["personas"], {**overall, "persona": "mean", "clicks": overall["clicks_mean"]}]:
        if row["persona"] == "mean":
            table.add_section()
        table.add_row(
            row["persona"],
            f"{row['clicks']:.0f}",
            f"{row['before']:.3f}",
            f"{row['after_10']:.3f}",
            f"{row['after_all']:.3f}",
            _signed(row["uplift"]),
            _signed(row["others_change"]),
            _micros(row["us_p50"]),
            _micros(row["us_p99"]),
        )
    return table


def _baselines(overall: dict[str, Any]) -> Table:
    table = _table("Beside other ways: mean MRR@10")
    table.add_column("adapter")
    for name in ("before", "after 10", "all", "change"):
        table.add_column(name, justify="right")
    before, sgd = overall["before"], overall["sgd_after_all"]
    table.add_row("none", *[f"{before:.3f}"] * 3, _signed(0.0))
    table.add_row(
        f"random A, SGD on A and B, rate {overall['sgd_rate']}",
        f"{before:.3f}",
        _plain(overall["sgd_after_10"]),
        _plain(sgd),
        _signed(None if sgd is None else sgd - before),
    )
    table.add_row(
        "data-aware A, instant (RLS)",
        f"{before:.3f}",
        f"{overall['after_10']:.3f}",
        f"{overall['after_all']:.3f}",
        _signed(overall["uplift"]),
    )
    return table


def _chart(console: Console, rows: list[dict[str, Any]]) -> None:
    """A bar for each persona: what the encoder alone finds, then what the adapter adds or takes away."""
    held, gained, lost = ("█", "▒", "░") if console.encoding.startswith("utf") else ("#", "+", "-")
    width = max(len(row["persona"]) for row in rows)
    scale = _BAR / max(1e-9, *(max(row["before"], row["after_all"]) for row in rows))
    for row in rows:
        before, after = round(row["before"] * scale), round(row["after_all"] * scale)
        line = Text(f"{row['persona']:<{width}}  ")
        line.append(held * min(before, after), style="cyan")
        line.append(
            (gained if after >= before else lost) * abs(after - before), "green" if after >= before else "red"
        )
        line.append(f" {row['before']:.3f} to {row['after_all']:.3f}")
        console.print(line, no_wrap=True)


def _home(folder: str) -> str:
    path = Path(folder)
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else folder


def show_run(result: dict[str, Any]) -> None:
    """Print what `microlora.demo.report.run` gave."""
    console = Console(highlight=False)
    overall, saved = result["overall"], result["saved"]
    _headline(console, result)
    console.print(_personas(result))
    console.print(_baselines(overall))
    _chart(console, result["personas"])
    console.print(
        f"\n{overall['personas_up']} of {overall['personas']} personas find more. "
        f"One click costs {overall['us_p50']:.1f} us (p50), {overall['us_p99']:.1f} us (p99): "
        "the call of instant alone, one thread."
    )
    console.print(
        f"An adapter has {saved['parameters']:,} parameters, {saved['weight_bytes']:,} bytes in float32, "
        f"{saved['file_bytes']:,} in its file."
    )
    same = "rank every held-out query the same" if saved["reloaded_ranks_equal"] else "DO NOT rank the same"
    console.print(
        f"{saved['files']} saved in {escape(_home(saved['folder']))}; read back, they {same}.", soft_wrap=True
    )


def show_answer(result: dict[str, Any]) -> None:
    """Print what `microlora.demo.report.answer` gave."""
    console = Console(highlight=False)
    _headline(console, result)
    alone = len(result["with"]) == 1
    known = {hit["where"] for hit in result["without"]}
    answers = [("no adapter", result["without"]), *((a["persona"], a["hits"]) for a in result["with"])]
    for title, hits in answers:
        console.print(f"\n[bold]{escape(title)}[/bold]")
        for hit in hits if alone or title == "no adapter" else hits[:3]:
            style = "" if hit["where"] in known else "green"
            console.print(Text(f"  {hit['score']:.3f}  ") + Text(hit["where"], style=style), soft_wrap=True)
            console.print(Text(f"         {hit['query']}", style="dim"), no_wrap=True, overflow="ellipsis")
