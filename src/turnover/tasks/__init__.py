"""What people do with influence: fit a run, score it, explain its errors."""
