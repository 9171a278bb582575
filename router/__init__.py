assert __name__ == "edgeft.router", "import edgeft.router, not router from the checkout"

from edgeft.router.fitting import evaluate, fit
from edgeft.router.policy import LoadedPolicy, decide, load_policy

__all__ = ["LoadedPolicy", "decide", "evaluate", "fit", "load_policy"]
