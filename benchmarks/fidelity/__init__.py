"""How near attributions come to what retraining says."""
