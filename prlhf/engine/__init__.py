"""The hand-written training engine: build, step, loop, checkpoint, launch."""
