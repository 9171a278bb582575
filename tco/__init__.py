assert __name__ == "edgeft.tco", "import edgeft.tco, not tco from the checkout"

from edgeft.tco.tabulate import Table, tabulate

__all__ = ["Table", "tabulate"]
