assert __name__ == "edgeft.router", "import edgeft.router, not router from the checkout"

from edgeft.router.decision import NoCandidate, decide, removed_for
from edgeft.router.evaluation import evaluate
from edgeft.router.fitting import Options, fit
from edgeft.router.policy import LoadedPolicy, load_policy
from edgeft.router.request import Request, State, from_openai
from edgeft.types import Decision

__all__ = [
    "Decision", "LoadedPolicy", "NoCandidate", "Options", "Request", "State", "decide", "evaluate", "fit", "from_openai",
    "load_policy", "removed_for",
]  # fmt: skip
