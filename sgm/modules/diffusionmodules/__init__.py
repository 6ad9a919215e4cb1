"""The diffusion mathematics and the networks."""
