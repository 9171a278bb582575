assert __name__ == "edgeft.bench", "import edgeft.bench, not bench from the checkout"

from edgeft.bench.run import Workload, bench

__all__ = ["Workload", "bench"]
