"""The box to cost, by its id."""

from __future__ import annotations

from edgeft.profiles import Profile, detect, from_detected, get_profile, load_profiles


def profile_of(profile_id: str) -> Profile:
    """A profile by id. `auto` is this box: the user's own file of it, else what detecting finds."""
    if profile_id != "auto" and not profile_id.startswith("detected-"):
        return get_profile(profile_id)
    box, known = detect(measure=False), load_profiles()
    wanted = box["id"] if profile_id == "auto" else profile_id
    if wanted in known or wanted != box["id"]:
        return get_profile(wanted)
    return from_detected(box)
