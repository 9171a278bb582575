assert __name__ == "edgeft.tco", "import edgeft.tco, not tco from the checkout"

from edgeft.tco.costs import ROWS, compare
from edgeft.tco.render import markdown, terminal

__all__ = ["ROWS", "compare", "markdown", "terminal"]
