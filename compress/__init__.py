assert __name__ == "edgeft.compress", "import edgeft.compress, not compress from the checkout"

from edgeft.compress.artifacts import compress, prepare
from edgeft.compress.make import MANIFEST, load_artifact
from edgeft.compress.recipe import Recipe

__all__ = ["MANIFEST", "Recipe", "compress", "load_artifact", "prepare"]
