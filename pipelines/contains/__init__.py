"""``openlvd contains``: which of some images have a near copy in the set that a run has made."""
