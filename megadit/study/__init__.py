"""Ways to build a model, compared: trained on the same data with several seeds, judged, reported with intervals."""
