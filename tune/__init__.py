assert __name__ == "edgeft.tune", "import edgeft.tune, not tune from the checkout"

from edgeft.tune.run import tune

__all__ = ["tune"]
