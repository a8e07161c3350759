"""What an estimate returns, in memory and on disk."""
