"""``openlvd why``: the story of one image of a run."""
