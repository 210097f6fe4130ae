"""How good a run is: benchmarks' folders of pictures, distances between sets of images, and the held-out loss."""
