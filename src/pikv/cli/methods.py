"""``pikv methods``: lists the presses."""

from rich.console import Console
from rich.table import Table


def methods_command() -> None:
    """List the presses by name.

    Combine them with ratios, e.g. [bold]eplb:0.35+duo:0.15[/bold].
    """
    from pikv.presses.registry import list_presses, press_info

    table = Table("name", "what it does", box=None, header_style="bold")
    for name in list_presses():
        table.add_row(name, press_info(name).description)
    Console(emoji=False).print(table)
