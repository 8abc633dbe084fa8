"""Models of a run: transformers, adapters, sharding, weights of every layout, samplers, codecs, text encoders."""
