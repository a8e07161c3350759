"""Other libraries' models and trainers; each module imports its library only when used."""
