"""What a TensorRT target's operator table says of a model, as text for people."""

from __future__ import annotations

from ..targets.tensorrt import OperatorCheck, OperatorFinding
from .output import Block

_SHOWN_NODES = 4


def operator_check_blocks(check: OperatorCheck) -> list[Block]:
    """The findings, most serious first, one paragraph each, and the verdict last."""
    title = f"Against the operator table of TensorRT {check.table} ({check.table_transcription}):"
    paragraphs: list[Block] = [_paragraph(item) for item in check.findings]
    return [title, *(paragraphs or ["nothing stands against it"]), check.verdict]


def _paragraph(item: OperatorFinding) -> str:
    lines = [f"{item.level}: {item.op}{_nodes(item.nodes)}", f"  why: {item.reason}", f"  do:  {item.remedy}"]
    return "\n".join(lines)


def _nodes(names: tuple[str, ...]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:_SHOWN_NODES])
    more = len(names) - _SHOWN_NODES
    rest = f" and {more} more (--json has all)" if more > 0 else ""
    return f" in {len(names)} node{'s' if len(names) > 1 else ''}: {shown}{rest}"
