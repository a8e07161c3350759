"""What each tool needs from its user for the same job: lines, passes over the data, storage, time."""
