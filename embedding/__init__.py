"""Images to unit vectors: decode, preprocess, backbones, batch embedding."""
