"""One function per kind of figure, from rows or tables; each says its setting and whether it was simulated."""

from lab.plot.blocks import pool_map
from lab.plot.charts import bars, heat, lines
from lab.plot.memory import CATEGORIES, agreement, fragmentation, memory_over_time
from lab.plot.roofline import attention_marks, roofline
from lab.plot.style import POLICIES, save, style
from lab.plot.timeline import timeline

__all__ = [
    "CATEGORIES",
    "POLICIES",
    "agreement",
    "attention_marks",
    "bars",
    "fragmentation",
    "heat",
    "lines",
    "memory_over_time",
    "pool_map",
    "roofline",
    "save",
    "style",
    "timeline",
]
