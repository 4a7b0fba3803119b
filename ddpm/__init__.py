"""The rooms behind train.py, push.py and sample.py; each imports only rooms above it.

errors, config, runfolder, commandline, hub, order, cutting, sources, decoding, datareport, blocks,
streaming, images, model, diffusion, ema, pipeline, tracking, checkpoint, plan, stopping, budget,
stepping, training, rehearsal, card, publishing.
"""
