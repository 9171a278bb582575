assert __name__ == "edgeft.serve", "import edgeft.serve, not serve from the checkout"

from edgeft.serve.run import Config, serve

__all__ = ["Config", "serve"]
