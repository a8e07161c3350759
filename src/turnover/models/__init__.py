"""The models that a run trains, and what differs between kinds of data."""
