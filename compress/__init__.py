assert __name__ == "edgeft.compress", "import edgeft.compress, not compress from the checkout"

from edgeft.compress.artifacts import MANIFEST, Recipe, compress, load_artifact, prepare

__all__ = ["MANIFEST", "Recipe", "compress", "load_artifact", "prepare"]
