"""Turn-over dropout: masks, the sites they act on, and networks trained under them."""
