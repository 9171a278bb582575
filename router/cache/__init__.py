assert __name__ == "edgeft.router.cache", "import edgeft.router.cache, not router.cache from the checkout"

from edgeft.router.cache.exact import ExactCache, Settings, keepable, key_of
from edgeft.router.cache.flight import Flights

__all__ = ["ExactCache", "Flights", "Settings", "keepable", "key_of"]
