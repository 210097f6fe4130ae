"""EC-DiT: a text-to-image diffusion transformer with expert-choice mixture-of-experts layers (arXiv 2410.02098).

Shape suffixes: B batch, T tokens, D model width, H heads, K head width, F hidden width, E experts, C capacity,
L text length, X text width, P width of a caption's pooled vector, V vectors of a modulation.
"""
