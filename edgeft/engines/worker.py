"""The child's side of an engine: load a model, listen on loopback, end when the parent is gone.

The order comes as one JSON line on standard input, the answer goes back as one JSON line on
standard output; everything that libraries print goes to standard error, which is the log. Standard
input staying open is the parent's sign of life.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve one model until standard input closes."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    order = json.loads(sys.stdin.readline())
    reply: dict[str, Any]
    try:
        from edgeft.engines import engine
        from edgeft.engines.chat_server import compute
        from edgeft.errors import EdgeftError

        started = time.monotonic()
        if order["options"].get("cores") and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, order["options"]["cores"])
        module = engine(order["engine"])
        reply = compute().submit(module.start, Path(order["folder"]), order["options"]).result()
        reply["load_s"] = time.monotonic() - started
    except EdgeftError as error:
        reply = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    except Exception as error:
        import traceback

        traceback.print_exc()
        reply = {"failed": f"{type(error).__name__}: {error}"}
    print(json.dumps(reply), file=answer, flush=True)
    if "port" in reply:
        sys.stdin.read()
    os._exit(0 if "port" in reply else 3)


if __name__ == "__main__":
    main()
