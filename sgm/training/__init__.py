"""Training: one logic of the step (`draws`, `batch`, `tasks`) and two runners of it.

`loop` runs it in plain torch, `module` in Lightning.
"""
