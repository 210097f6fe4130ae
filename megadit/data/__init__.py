"""Where samples come from: data sets, and batches as a pure function of seed and step."""
