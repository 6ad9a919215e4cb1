"""Parts of the autoencoders."""
