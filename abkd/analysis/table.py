"""The before/after table, for a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = {
    "forward_kl": ("forward KL", "{:.3f}"),
    "reverse_kl": ("reverse KL", "{:.3f}"),
    "alpha_beta": ("α-β (.2, .7)", "{:.3f}"),
    "token_agreement": ("agreement", "{:.1%}"),
    "next_token_loss": ("next-token", "{:.3f}"),
    "rouge_l": ("ROUGE-L", "{:.1f}"),
    "num_parameters": ("parameters", "{:,}"),
}
MIN_WIDTH = 110
TITLE = """Validation. Divergences from the teacher and next-token loss on the data: nats per token, lower is better.
Agreement: tokens where student and teacher prefer the same one."""


def print_table(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Measures of several models under each other; lower is better but for agreement and ROUGE-L.

    Args:
        rows: name -> the measures of `measures.measure`; a measure that none has gets no column.
    """
    shown = [key for key in COLUMNS if any(key in row for row in rows.values())]
    table = Table(title=TITLE, title_justify="left")
    table.add_column("", no_wrap=True)
    for key in shown:
        table.add_column(COLUMNS[key][0], justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(name, *(COLUMNS[key][1].format(row[key]) if key in row else "" for key in shown))
    Console(width=max(Console().width, MIN_WIDTH)).print(table)
