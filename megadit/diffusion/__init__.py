"""Rectified flow: objective, timesteps, samplers, guidance. Imports torch only; the network is a callable."""
