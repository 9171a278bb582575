from edgeft.serve.cluster.deploy import serve_on_ray
from edgeft.serve.cluster.settings import Cluster, Place

__all__ = ["Cluster", "Place", "serve_on_ray"]
