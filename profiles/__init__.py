assert __name__ == "edgeft.profiles", "import edgeft.profiles, not profiles from the checkout"

from edgeft.profiles.detection import detect
from edgeft.profiles.loader import Profile, from_detected, get_profile, load_profiles

__all__ = ["Profile", "detect", "from_detected", "get_profile", "load_profiles"]
