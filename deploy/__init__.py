assert __name__ == "edgeft.deploy", "import edgeft.deploy, not deploy from the checkout"

from edgeft.deploy.bundle import Wanted, bundle
from edgeft.deploy.hosts import deploy

__all__ = ["Wanted", "bundle", "deploy"]
