from edgeft.serve.cluster.settings import Cluster, Place

__all__ = ["Cluster", "Place"]
