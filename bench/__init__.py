assert __name__ == "edgeft.bench", "import edgeft.bench, not bench from the checkout"

from edgeft.bench.run import bench
from edgeft.bench.workload import Workload

__all__ = ["Workload", "bench"]
