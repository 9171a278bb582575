assert __name__ == "edgeft.serve", "import edgeft.serve, not serve from the checkout"

from edgeft.serve.config import Config, shown
from edgeft.serve.config_file import load
from edgeft.serve.run import serve

__all__ = ["Config", "load", "serve", "shown"]
