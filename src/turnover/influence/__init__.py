"""Influence of training instances on predictions, with the noise floor of every number."""
