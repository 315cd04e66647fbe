"""One layer over several ranks: tensor and sequence parallel."""
