"""Ready configs for five kinds of work, and a small router from words to presets.

A preset is one row of `PRESETS`: its config, its domains, its use cases and the words that lead to it.
Adding one needs nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from microlora._checks import near, text
from microlora.config import LoraConfig
from microlora.exceptions import UnknownPresetError
from microlora.target import TargetModule

__all__ = ["PRESETS", "Preset", "by_domain", "get", "info", "names", "route"]


@dataclass(frozen=True)
class Preset:
    """A config and what it is for.

    Attributes:
        config: The adapter's settings; its name is the preset's.
        domains: Fields of work, as `by_domain` finds them.
        use_cases: Jobs in words.
        keywords: Further single words of a task that lead to this preset.
    """

    config: LoraConfig
    domains: tuple[str, ...]
    use_cases: tuple[str, ...]
    keywords: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the preset."""
        return self.config.name


_ALL = (
    Preset(
        config=LoraConfig(
            name="coder",
            description="Code generation and refactoring",
            rank=16,
            alpha=32.0,
            target_modules=TargetModule.attention(),
            dropout=0.05,
            tags=("code-gen", "refactoring", "syntax"),
        ),
        domains=("code", "programming", "refactoring"),
        use_cases=("code completion", "refactoring", "syntax correction"),
        keywords=("coding", "implement", "function", "completion", "refactor", "syntax", "compile"),
    ),
    Preset(
        config=LoraConfig(
            name="researcher",
            description="Information analysis and synthesis",
            rank=8,
            alpha=16.0,
            target_modules=(TargetModule.Q_PROJ, TargetModule.K_PROJ, TargetModule.V_PROJ),
            dropout=0.1,
            tags=("analysis", "research", "synthesis"),
        ),
        domains=("research", "analysis", "information"),
        use_cases=("research synthesis", "information extraction", "analysis"),
        keywords=("synthesis", "synthesize", "extraction", "analyze", "analyse", "summarize", "literature"),
    ),
    Preset(
        config=LoraConfig(
            name="security",
            description="Vulnerability detection and secure coding",
            rank=16,
            alpha=32.0,
            target_modules=TargetModule.attention() + TargetModule.mlp(),
            dropout=0.05,
            tags=("security", "vulnerabilities", "audit"),
        ),
        domains=("security", "vulnerability detection", "secure coding"),
        use_cases=("security auditing", "vulnerability detection", "secure code patterns"),
        keywords=("audit", "secure", "vulnerability", "vulnerabilities", "exploit", "threat"),
    ),
    Preset(
        config=LoraConfig(
            name="architect",
            description="System design and architecture",
            rank=12,
            alpha=24.0,
            target_modules=(
                TargetModule.Q_PROJ,
                TargetModule.V_PROJ,
                TargetModule.GATE_PROJ,
                TargetModule.UP_PROJ,
            ),
            dropout=0.05,
            tags=("architecture", "design", "patterns"),
        ),
        domains=("architecture", "system design"),
        use_cases=("system design", "architectural decisions", "pattern selection"),
        keywords=("architectural", "design", "pattern", "component"),
    ),
    Preset(
        config=LoraConfig(
            name="reviewer",
            description="Code review and quality assessment",
            rank=8,
            alpha=16.0,
            target_modules=TargetModule.quality(),
            dropout=0.1,
            tags=("review", "quality", "best-practices"),
        ),
        domains=("review", "code quality"),
        use_cases=("code review", "quality assessment", "best practices"),
        keywords=("quality", "assessment", "practices", "feedback"),
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}
"""Every preset by name, in the order in which they are listed and ties are broken."""


def names() -> tuple[str, ...]:
    """Names of all presets."""
    return tuple(PRESETS)


def info(name: str) -> Preset:
    """A preset with its domains and use cases.

    Raises:
        UnknownPresetError: no preset has that name; the message carries the nearest names.
    """
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        hint = near(name, PRESETS) if isinstance(name, str) else ""
        raise UnknownPresetError(f"preset: got {name!r}, expected one of {', '.join(PRESETS)}{hint}")
    return preset


def get(name: str) -> LoraConfig:
    """The config of a preset.

    Raises:
        UnknownPresetError: no preset has that name; the message carries the nearest names.
    """
    return info(name).config


def by_domain(domain: str) -> tuple[LoraConfig, ...]:
    """Configs of the presets that serve a domain, in the order of `names`; none if nothing matches.

    Args:
        domain: Matches, whatever its case, any part of a preset's name, domains, use cases or tags.

    Raises:
        ConfigError: ``domain`` is empty or no string.
    """
    wanted = " ".join(text("domain", domain, empty=False).lower().split())
    return tuple(
        preset.config
        for preset in PRESETS.values()
        if any(
            wanted in entry
            for entry in (preset.name, *preset.domains, *preset.use_cases, *preset.config.tags)
        )
    )


def route(task: str, default: str = "coder") -> LoraConfig:
    """The config whose preset fits a task best, read off its words.

    A preset earns one point for each word of the task that is its name, a one-word domain or a keyword, and
    for each of its domains and use cases that the task contains as a phrase its number of words squared. The
    most points win, then the earliest match in the task, then the order of `names`.

    Args:
        task: A task type (``"code"``, ``"research"``, ``"security"``, ``"architecture"``, ``"review"``), a
            preset's name or a few words.
        default: Name of the preset for a task of which no word is known.

    Raises:
        ConfigError: ``task`` is no string.
        UnknownPresetError: ``default`` is no preset.
    """
    fallback = get(default)
    words = re.findall(r"[a-z]+", text("task", task).lower())
    best, best_key = fallback, (0, 0)
    for preset in PRESETS.values():
        points, first = _fit(preset, words)
        if points and (points, -first) > best_key:
            best, best_key = preset.config, (points, -first)
    return best


def _fit(preset: Preset, words: list[str]) -> tuple[int, int]:
    """Points of ``route`` and the index of the first word that matched."""
    phrases = (*preset.domains, *preset.use_cases)
    singles = {preset.name, *preset.keywords, *(phrase for phrase in phrases if " " not in phrase)}
    hits = [i for i, word in enumerate(words) if any(_same(word, single) for single in singles)]
    points = len(hits)
    for phrase in phrases:
        parts = phrase.split()
        if len(parts) > 1:
            for i in range(len(words) - len(parts) + 1):
                if all(_same(word, part) for word, part in zip(words[i:], parts, strict=False)):
                    points += len(parts) ** 2
                    hits.append(i)
                    break
    return points, min(hits, default=0)


def _same(word: str, known: str) -> bool:
    """Equal, or the same word with another ending (review, reviewing)."""
    if word == known:
        return True
    short, long = sorted((word, known), key=len)
    return len(short) >= 5 and long.startswith(short) and len(long) - len(short) <= 4
