"""The two engines: plain modules that build, encode, decode and give a loss."""
