"""How the background loop brings fast and slow weights together, by name."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from microlora._checks import near, wrong

__all__ = ["Consolidation"]


class Consolidation(StrEnum):
    """Strategies of the background loop; a member is a ``str``.

    ===================  ============================================================================
    ``ewc_merge``        fast and slow weighed by what each has seen, then steps on window and
                         reservoir (DER++, arXiv 2004.07211): the default, for several domains
    ``average``          the plain mean of both: quick, and may lose what one of them knew
    ``quality_weighted`` samples count by their quality above the threshold
    ``best_only``        only the best samples of the window teach: for feedback of high variance
    ``ensemble``         one set of weights for each pattern of inputs: for uses that have little in
                         common
    ===================  ============================================================================

    The names in CamelCase that other systems use (``EwcMerge``) are read too.
    """

    EWC_MERGE = "ewc_merge"
    AVERAGE = "average"
    QUALITY_WEIGHTED = "quality_weighted"
    BEST_ONLY = "best_only"
    ENSEMBLE = "ensemble"

    @classmethod
    def _missing_(cls, value: object) -> Any:
        names = [member.value for member in cls]
        if isinstance(value, str):
            for member in cls:
                if value in (member.name, "".join(part.title() for part in member.value.split("_"))):
                    return member
        hint = near(value, names) if isinstance(value, str) else ""
        raise wrong("consolidation", value, f"one of {', '.join(names)}{hint}")
