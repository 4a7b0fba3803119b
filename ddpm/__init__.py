"""The rooms behind train.py, push.py and sample.py; each imports only rooms above it.

errors, config, runfolder, commandline, hub, images, order, model, diffusion, ema, pipeline,
tracking, checkpoint, plan, stopping, budget, stepping, training, rehearsal, card, publishing.
"""
