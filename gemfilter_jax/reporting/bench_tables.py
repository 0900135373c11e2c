"""Tables of what `gemfilter bench` has measured: medians, in lines of about 100 characters."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from gemfilter_jax.errors import printable

if TYPE_CHECKING:
    from gemfilter_jax.evals.bench import Row

_COLUMNS = (
    "method",
    "prompt\ntokens",
    "kept",
    "filter\ns",
    "prefill\ns",
    "token\nms",
    "first\ntoken s",
    "total\ns",
    "full /\nthis",
    "memory\nGB",
)


def tables(rows: "Sequence[Row]", title: str) -> list[Table]:
    """A table for each batch size; the title tells what was measured, on which device."""
    batches = list(dict.fromkeys(row.batch for row in rows))
    tell_attention, made = attention_matters(rows), []
    for batch in batches:
        titled = title if len(batches) == 1 else f"{title}, batch {batch}"
        table = Table(title=Text(printable(titled)), title_justify="left")
        for column in _COLUMNS:
            table.add_column(column, justify="right" if table.columns else "left")
        for row in rows:
            if row.batch == batch:
                table.add_row(*_cells(row, tell_attention))
        made.append(table)
    return made


def attention_matters(rows: "Sequence[Row]") -> bool:
    """Whether the rows have several filter attentions, which are then to be told."""
    return len({row.filter_attention for row in rows if row.filter_attention}) > 1


def _cells(row: "Row", tell_attention: bool) -> list[str]:
    def of(name: str, scale: float = 1, digits: int = 2) -> str:
        return f"{row.median[name] * scale:.{digits}f}" if name in row.median else "-"

    return [
        f"{row.method} {row.filter_attention}" if tell_attention and row.filter_attention else row.method,
        f"{row.prompt_tokens:,}",
        f"{row.kept_tokens:,}",
        of("filter_seconds"),
        of("prefill_seconds"),
        of("decode_step_seconds", 1e3, 1),
        of("first_token_seconds"),
        of("total_seconds"),
        of("full_to_this_ratio"),
        f"{row.memory / 1e9:.2f}",
    ]
