"""``pikv methods``: lists the presses."""

from pikv.cli.results import print_table


def methods_command() -> None:
    """List the presses by name.

    Combine them with ratios, e.g. [bold]eplb:0.35+duo:0.15[/bold].
    """
    from pikv.presses.registry import list_presses, press_info

    rows = [[name, press_info(name).description] for name in list_presses()]
    print_table("Presses", ["name", "what it does"], rows, text=["what it does"])
