"""The shared package behind μOmni's seven training scripts."""
